"""Comparisons: several recipes under one budget, or finished runs, as a table that decides."""
