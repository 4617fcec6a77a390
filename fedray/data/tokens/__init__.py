"""From checked examples to tokens and labels: texts, prompts with answers, and conversations.

Uses: config, data, models.
"""
