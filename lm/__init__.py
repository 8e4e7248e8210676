"""Transformer language models from scratch: layers, optimizer, training, generation."""
