"""Chat templates by name: the jinja text that is saved with a model and serves train, eval and serve alike."""

from typing import Any

from acformer.data.chat_format import chat_format
from acformer.data.rendering import FLATTEN
from acformer.errors import UsageError, unknown_name

_VICUNA_V1 = """
{{- bos_token or '' -}}
{%- if messages[0]['role'] != 'system' -%}
    {{- 'A chat between a curious user and an artificial intelligence assistant. ' -}}
    {{- "The assistant gives helpful, detailed, and polite answers to the user's questions. " -}}
{%- endif -%}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'ASSISTANT:' -}}
        {%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- ('USER: ' if message['role'] == 'user' else '') + message['content'] + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_PLAIN = """
{{- bos_token or '' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
    {%- elif message['role'] == 'user' -%}
        {{- '<image>' * message['content'].count('<image>') -}}
    {%- endif -%}
{%- endfor -%}
"""

_BARE = """
{{- bos_token or '' -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'A:' -}}{%- generation -%}{{- ' ' + message['content'] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message['content'] + ' ' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'A:' -}}{%- endif -%}
"""

TEMPLATES: dict[str, str] = {
    "vicuna_v1": FLATTEN + _VICUNA_V1,
    "plain": FLATTEN + _PLAIN,
    "bare": FLATTEN + _BARE,
}
"""Jinja chat templates by name; an image part is rendered as `<image>` and a newline, at its place.

- `vicuna_v1`: LLaVA-1.5's `SYSTEM USER: ... ASSISTANT: ...</s>USER: ...`; the space before an answer is the
  model's to say. A system message replaces the default system prompt.
- `plain`: stage 1, image tokens and the caption, no other word of the user. Differs from LLaVA's: the caption
  ends with the end token instead of a newline, so that the model learns to stop.
- `bare`: nothing but `A:` before an answer, whose space is again the model's to say; for small language models
  that start from nothing.
"""


NO_THINKING = "{%- set enable_thinking = false -%}\n"
"""What switches thinking off in templates that ask: an empty block then stands in the generation prompt."""


def resolve_template(name: str, tokenizer: Any) -> str:
    """The jinja text of template `name`, to be saved as the processor's `chat_template`.

    `name` is a key of `TEMPLATES`, or `tokenizer` for the tokenizer's own template, which then takes content lists
    with images too, does not think, and has all that it writes before an answer in its generation prompt: what a
    template puts in front of the words (Qwen3's empty thinking block) is not the model's to say.

    Raises:
        UsageError: an unknown name, a tokenizer without a template, or one whose template does not fit.
    """
    if name in TEMPLATES:
        return TEMPLATES[name]
    if name != "tokenizer":
        raise unknown_name("chat template", name, [*TEMPLATES, "tokenizer"])
    try:
        own = tokenizer.get_chat_template()
    except ValueError:
        raise UsageError(f"the tokenizer has no chat template; valid: {', '.join(TEMPLATES)}") from None
    if own.startswith(FLATTEN):
        return own  # of a model that was saved with it
    own = FLATTEN + (NO_THINKING if "enable_thinking" in own else "") + own
    lead = chat_format(tokenizer, own).lead
    return own + f"{{%- if add_generation_prompt -%}}{{{{- {lead!r} -}}}}{{%- endif -%}}" if lead.strip() else own
