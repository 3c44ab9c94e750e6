"""IBM Granite language models over whole document corpora on Ray.

plan shards → read documents → prepare chunks → generate answers → merge results → commit shards
"""
