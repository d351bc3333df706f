"""What is promised of what leaves a site: transforms on updates, and the account of what they cost."""

from fedseg import one_copy

one_copy(__name__)
