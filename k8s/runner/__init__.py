"""What pipeline.py is made of: standard library and kubectl only."""
