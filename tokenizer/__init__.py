"""Byte-level BPE from scratch: train a tokenizer, turn text into ids and ids into text."""
