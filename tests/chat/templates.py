"""Chat templates in the forms that models have."""

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

LLAMA3 = (
    "{{- bos_token }}"
    "{%- for message in messages -%}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{- message['content'] | trim + '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{%- endif -%}"
)

GEMMA = (
    "{{ bos_token }}"
    "{%- if messages[0]['role'] == 'system' -%}"
    "{{ raise_exception('System role not supported') }}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{%- endif -%}"
    "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
    "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
)

MISTRAL = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ ' ' + message['content'] + eos_token }}"
    "{%- else -%}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# As Qwen 3: old reasoning is dropped, the last message's is written anew.
REASONING = (
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- set thought = '' -%}"
    "{%- if message['role'] == 'assistant' and '</think>' in content -%}"
    "{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1] -%}"
    "{%- set content = content.split('</think>')[-1].lstrip('\n') -%}"
    "{%- endif -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if loop.last and thought -%}{{ '<think>\n' + thought + '\n</think>\n\n' }}{%- endif -%}"
    "{{ content + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)

# Nothing between messages: two of them could join into a control token.
BARE = "{%- for message in messages -%}{{ message['content'] }}{%- endfor -%}"

# White space after its control token belongs to the token.
SWALLOWING = (
    "{%- for message in messages -%}"
    "{{ '<|swallow|>\n' + message['content'] + '<|im_end|>\n' }}"
    "{%- endfor -%}"
)

ALL = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "mistral": MISTRAL,
    "reasoning": REASONING,
    "bare": BARE,
    "swallowing": SWALLOWING,
}

# As DeepSeek R1: the generation prompt begins the reasoning, which old replies do not have.
THINKS_FIRST = (
    "{{ bos_token }}"
    "{%- for message in messages -%}"
    "{%- set content = message['content'] -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ '<|im_start|>' + content.split('</think>')[-1] + '<|im_end|>' }}"
    "{%- else -%}"
    "{{ '<|start_header_id|>' + content }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|><think>\n' }}{%- endif -%}"
)

# As later Mistrals: the system prompt stands in the last message, so it moves with every turn.
MOVING = (
    "{{ bos_token }}"
    "{%- for message in messages if message['role'] != 'system' -%}"
    "{%- if message['role'] == 'assistant' -%}"
    "{{ message['content'] + eos_token }}"
    "{%- elif loop.last and messages[0]['role'] == 'system' -%}"
    "{{ '<|im_start|>' + messages[0]['content'] + '\n\n' + message['content'] + '<|im_end|>' }}"
    "{%- else -%}"
    "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
)

# Only the user's words: replies are lost.
FORGETFUL = (
    "{%- for message in messages if message['role'] != 'assistant' -%}"
    "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
    "{%- endfor -%}"
)

# A reply is written twice: which of the two was computed?
REPEATING = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}"
    "{%- if message['role'] == 'assistant' -%}{{ message['content'] }}{%- endif -%}"
    "{%- endfor -%}"
)

# The last reply ends in another way than the old ones.
RESTLESS = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['content'] }}"
    "{{ '<|im_end|>' if loop.last else '<|eot_id|>' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>' }}{%- endif -%}"
)

# Forms that are tried with histories only.
HISTORIES = {
    "thinks_first": THINKS_FIRST,
    "moving": MOVING,
    "forgetful": FORGETFUL,
    "repeating": REPEATING,
    "restless": RESTLESS,
}
