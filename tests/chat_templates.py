"""Chat templates that do what public models' do, written from their known behaviours, each with its tokens."""

from __future__ import annotations

from transformers import AddedToken, PreTrainedTokenizerFast

from tests.families import tiny_tokenizer

# Qwen2.5: ChatML, EOS of the base model is another token; tools in a system message; calls as JSON in tags.
QWEN_2_5 = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role }}{% if m.content %}{{ '\n' + m.content }}{% endif %}"
    '{% for c in m.tool_calls or [] %}{% set f = c.function or c %}{{ \'\n<tool_call>\n{"name": "\' + f.name }}'
    "{{ '\", \"arguments\": ' }}{{ f.arguments | tojson }}{{ '}\n</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Qwen3: the last answer after the last question opens with its thoughts, also empty ones; earlier answers lose them.
QWEN_3 = (
    "{% if tools %}{{ '<|im_start|>system\\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\\n' }}{% endif %}"
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}"
    "{% endfor %}{% for m in messages %}{% set content = m.content if m.content is string else '' %}"
    "{% if m.role == 'assistant' %}{% set thought = '' %}{% if m.reasoning_content is string %}"
    "{% set thought = m.reasoning_content %}{% elif '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}{% else %}{{ content }}"
    "{% endif %}"
    "{% for c in m.tool_calls or [] %}{% set f = c.function or c %}"
    '{{ \'\n<tool_call>\n{"name": "\' + f.name + \'", "arguments": \' }}'
    "{% if f.arguments is string %}{{ f.arguments }}{% else %}{{ f.arguments | tojson }}{% endif %}"
    "{{ '}\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + m.role + '\n' + content + '<|im_end|>\n' }}"
    "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{% endif %}"
)
# GLM-4: a turn ends with the next role's token, the last one with nothing.
GLM_4 = (
    "{{ '[gMASK]<sop>' }}{% for m in messages %}{{ '<|' + ('observation' if m.role == 'tool' else m.role) + '|>' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.function.name + '\n' + c.function.arguments | tojson }}{% endfor %}"
    "{% else %}{{ '\n' + m.content }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}"
    "{% endif %}"
)
# Llama 3: headers, content stripped, a call of a tool in the answer's place.
LLAMA_3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' }}"
    '{% if m.tool_calls %}{{ \'{"name": "\' + m.tool_calls[0].function.name + \'", "parameters": \' }}'
    "{{ m.tool_calls[0].function.arguments | tojson }}{{ '}' }}{% else %}{{ m.content | trim }}{% endif %}"
    "{{ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Gemma: the assistant is called model, no system message, content stripped; calls are left out in silence.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
    "{{ raise_exception('System role not supported') }}"
    "{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}"
    "{{ (m.content or '') | trim }}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Mistral: no role tokens for answers; tools stand before the last question, so that earlier turns change.
MISTRAL = (
    "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% if tools and m == users[-1] %}"
    "{{ '[AVAILABLE_TOOLS]' + (tools | tojson) + '[/AVAILABLE_TOOLS]' }}"
    "{% endif %}{{ '[INST] ' + m.content + '[/INST]' }}{% elif m.role == 'tool' %}"
    "{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}{% elif m.tool_calls is defined %}"
    "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ ']' + eos_token }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
# DeepSeek-V3: arguments are JSON, content is null where tools are called, calls close with several tokens.
DEEPSEEK_V3 = (
    "{{ bos_token }}{% set ns = namespace(is_tool=false) %}{% for m in messages %}{% if m.role == 'user' %}"
    "{% set ns.is_tool = false %}{{ '<｜User｜>' + m.content }}{% elif m.role == 'assistant' and m.content is none %}"
    "{{ '<｜Assistant｜><｜calls▁begin｜>' }}{% for c in m.tool_calls %}"
    "{{ '<｜call▁begin｜>' + c.function.name + '\n' + c.function.arguments + '<｜call▁end｜>' }}{% endfor %}"
    "{{ '<｜calls▁end｜>' + eos_token }}{% elif m.role == 'assistant' %}{% set content = m.content %}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    "{{ ('<｜outputs▁end｜>' if ns.is_tool else '<｜Assistant｜>') + content + eos_token }}{% set ns.is_tool = false %}"
    "{% elif m.role == 'tool' %}{{ '<｜outputs▁begin｜>' if not ns.is_tool else '' }}{{ m.content }}"
    "{% set ns.is_tool = true %}"
    "{% endif %}{% endfor %}{% if ns.is_tool %}{{ '<｜outputs▁end｜>' }}{% endif %}"
    "{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>' }}{% endif %}"
)
# R1-Distill: the same, and what is to be written begins inside of a thought.
R1_DISTILL = DEEPSEEK_V3.replace("{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜><think>\n' }}")
# DeepSeek-V3.1: what is to be written begins after a closed thought.
DEEPSEEK_V3_1 = DEEPSEEK_V3.replace("else '<｜Assistant｜>')", "else '<｜Assistant｜></think>')").replace(
    "{{ '<｜Assistant｜>' }}", "{{ '<｜Assistant｜></think>' }}"
)
# Phi-3: the end of a turn, and after the last one the end of the document.
PHI_3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
DEEPSEEK = (
    "<｜bos｜> <｜User｜> <｜Assistant｜> <｜calls▁begin｜> <｜call▁begin｜> <｜call▁end｜> <｜calls▁end｜> "
    "<｜outputs▁begin｜> <｜outputs▁end｜>"
)
TEMPLATES: dict[str, tuple[str, str]] = {
    "qwen2.5": (QWEN_2_5, "<|im_start|> <|im_end|>"),
    "qwen3": (QWEN_3, "<|im_start|> <|im_end|>"),
    "glm-4": (GLM_4, "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|>"),
    "llama-3": (LLAMA_3, "<|begin_of_text|> <|start_header_id|> <|end_header_id|> <|eot_id|>"),
    "gemma": (GEMMA, "<bos> <start_of_turn> <end_of_turn>"),
    "mistral": (
        MISTRAL,
        "<s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_CALLS] [TOOL_RESULTS] [/TOOL_RESULTS]",
    ),
    "deepseek-v3": (DEEPSEEK_V3, DEEPSEEK),
    "deepseek-v3.1": (DEEPSEEK_V3_1, DEEPSEEK),
    "r1-distill": (R1_DISTILL, DEEPSEEK),
    "phi-3": (PHI_3, "<|system|> <|user|> <|assistant|> <|end|>"),
}
BOS = {"llama-3", "gemma", "mistral", "deepseek-v3", "deepseek-v3.1", "r1-distill"}


def tokenizer_like(name: str) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with the template and the special tokens of a public model's; its EOS is `<|endoftext|>`."""
    template, special = TEMPLATES[name]
    return with_template(template, *special.split(), bos=special.split()[0] if name in BOS else None)


def with_template(template: str, *special: str, bos: str | None = None) -> PreTrainedTokenizerFast:
    """A tiny tokenizer with a template, and special tokens that it writes."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(each, special=True) for each in special]})
    if bos is not None:
        tokenizer.bos_token = bos
    tokenizer.chat_template = template
    return tokenizer
