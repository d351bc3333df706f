"""What the commands share that make images before a segmenter is trained: images read, and data written anew."""
