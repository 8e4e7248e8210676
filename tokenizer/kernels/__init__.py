"""The compiled inner loops: scan, count, merge, encode, and lists of ints.

Each algorithm has a textbook version in `tokenizer.reference`.
"""
