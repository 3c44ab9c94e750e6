"""The corpus and checkpoint that `quickstart` names in a config, and how they were made."""
