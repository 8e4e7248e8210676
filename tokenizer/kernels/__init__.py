"""The compiled inner loops: scan, count, merge, encode. Each has a textbook version in `tokenizer.reference`."""
