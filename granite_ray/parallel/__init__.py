"""Ranks that run one model together: how they meet, and how tokens reach their experts."""
