"""The public laws."""
