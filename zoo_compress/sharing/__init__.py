"""Giving compressed models to others: cards, the Hub, the shipped index, other formats."""
