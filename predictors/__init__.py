"""Forecasts: everything that says how much each expert will be used soon."""
