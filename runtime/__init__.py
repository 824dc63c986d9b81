"""Spending the forecasts: caching, moving and computing experts, and simulating all three."""
