"""The compiled inner loops: scan, count, merge, encode, and lists of ints.

Each algorithm has a textbook version in `tokenizer.reference`.
"""

PADDING = 64  # bytes that must be readable after the end of a text
