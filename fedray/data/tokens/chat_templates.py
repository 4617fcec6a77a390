"""Chat templates for tokenizers that have none, by the name that `data.chat_template` gives them.

They mark what the assistant writes with `{% generation %}`: its text and the token that ends its turn.
"""

CHATML = """\
{%- for turn in messages -%}
<|im_start|>{{ turn.role }}
{% if turn.role == 'assistant' %}{% generation %}{{ turn.content | trim }}<|im_end|>{% endgeneration %}
{%- else %}{{ turn.content | trim }}<|im_end|>
{%- endif %}{{ '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""
"""Turns between `<|im_start|>` and `<|im_end|>`, which must be tokens of the tokenizer."""

PLAIN = """\
{%- for turn in messages -%}
{%- if turn.role == 'assistant' %}Assistant:{% generation %} {{ turn.content | trim }}{{ eos_token }}{% endgeneration %}
{%- elif turn.role in ('system', 'developer') %}{{ turn.content | trim }}
{%- else %}{{ turn.role | capitalize }}: {{ turn.content | trim }}
{%- endif %}{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
"""Plain text: `User: ...`, `Assistant: ...`; the end-of-text token ends the assistant's turns. For every tokenizer."""

CHAT_TEMPLATES = {"chatml": CHATML, "plain": PLAIN}
