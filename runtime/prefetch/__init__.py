"""Bringing experts into slots ahead of their use, while the link would be idle, if it pays."""
