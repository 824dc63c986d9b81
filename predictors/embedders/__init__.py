"""Embedders: everything that turns a prompt's text into one vector."""
