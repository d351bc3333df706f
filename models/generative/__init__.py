"""Small networks that make images, and how they are trained: on a processor, at 32 to 128 pixels."""
