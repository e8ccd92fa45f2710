"""The built-in chat templates: Jinja texts that render as those of mergekit 0.1.5 do."""

from __future__ import annotations

_ALPACA = """\
{%- set systems = messages | selectattr('role', 'equalto', 'system') | list -%}
{{- (systems | last).content | trim if systems else '' -}}
{{- '\\n\\n' -}}
{%- set titles = {'user': 'Instruction', 'assistant': 'Response', 'user_context': 'Input'} -%}
{%- for message in messages -%}
{%- if message['role'] in titles -%}
{{- '### ' + titles[message['role']] + ':\\n' + message['content'] | trim -}}
{%- if not loop.last -%}{{- '\\n\\n' -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] != 'assistant' -%}
{{- '### Response:\\n' -}}
{%- endif -%}
"""

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

_EXAONE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{- '        [|system|][|endofturn|]\\n\\n' -}}
{%- endif -%}
{{- '    [|' + message['role'] + '|]' + message['content'] + '\\n        ' -}}
{{- '\\n\\n' if message['role'] == 'user' else '[|endofturn|]\\n\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '    [|assistant|]\\n' -}}
{%- endif -%}
"""

_LLAMA3 = """\
{%- for message in messages -%}
{{- bos_token if loop.first else '' -}}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

_MISTRAL = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none -%}
{%- set turns = messages if system is none else messages[1:] -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('After the optional system message, roles must alternate: user, assistant, user, ...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- ' [INST] ' + (system + '\\n\\n' if loop.first and system is not none else '') + message['content'] + ' [/INST]' -}}
{%- elif message['role'] == 'assistant' -%}
{{- ' ' + message['content'] + eos_token -}}
{%- else -%}
{{- raise_exception('Only the roles user and assistant may follow the optional system message.') -}}
{%- endif -%}
{%- endfor -%}
"""

BUILT_IN = {"alpaca": _ALPACA, "chatml": _CHATML, "exaone": _EXAONE, "llama3": _LLAMA3, "mistral": _MISTRAL}
