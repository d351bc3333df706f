"""What is promised of what leaves a site: transforms on updates, and the account of what they cost."""
