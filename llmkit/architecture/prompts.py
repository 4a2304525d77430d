"""Prompt formats as data, each with its source, and the choice among them."""

from __future__ import annotations

from dataclasses import replace

from llmkit.architecture.prompt_kinds import (
    CUT,
    ChatTemplate,
    Finish,
    Instruction,
    Message,
    Piece,
    Prompt,
    Raw,
    Token,
    Turns,
    text_of,
)
from llmkit.errors import InputError, suggestion

__all__ = [
    "FORMATS",
    "ChatTemplate",
    "Instruction",
    "Message",
    "Piece",
    "Prompt",
    "Raw",
    "Token",
    "Turns",
    "choose_prompt",
    "name_of",
    "text_of",
]

_ALPACA = "Below is an instruction that describes a task"
_ALPACA_REQUEST = "Write a response that appropriately completes the request."
_VICUNA = (
    "A chat between a curious {who} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {who}'s questions."
)
_BAIZE = (
    "The following is a conversation between a human and an AI assistant named Baize (named after a mythical creature "
    "in Chinese folklore). Baize is an open-source AI assistant developed by UCSD and Sun Yat-Sen University. The "
    "human and the AI assistant take turns chatting. Human statements start with [|Human|] and AI assistant statements "
    "start with [|AI|]. The AI assistant always provides responses in as much detail as possible, and in Markdown "
    "format. The AI assistant always declines to engage with topics, questions and instructions related to unethical, "
    "controversial, or sensitive issues. Complete the transcript in exactly that format.\n"
)
_BUDDY = (
    "You are a helpful, respectful and honest INTP-T AI Assistant named Buddy. You are talking to a human User.\n"
    "Always answer as helpfully and logically as possible, while being safe. Your answers should not include any "
    "harmful, political, religious, unethical, racist, sexist, toxic, dangerous, or illegal content. Please ensure "
    "that your responses are socially unbiased and positive in nature.\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering something "
    "not correct. If you don't know the answer to a question, please don't share false information.\n"
    "You can speak fluently in many languages, for example: English, Chinese.\n"
    "You cannot access the internet, but you have vast knowledge, cutoff: 2021-09.\n"
    "You are trained by OpenBuddy team, (https://openbuddy.ai, https://github.com/OpenBuddy/OpenBuddy), you are based "
    "on LLaMA and Falcon transformers model, not related to GPT or OpenAI."
)
_STABLELM = (
    "# StableLM Tuned (Alpha version)\n"
    "- StableLM is a helpful and harmless open-source AI language model developed by StabilityAI.\n"
    "- StableLM is excited to be able to help the user, but will refuse to do anything that could be considered "
    "harmful to the user.\n"
    "- StableLM is more than just an information source, StableLM is also able to write poetry, short stories, and "
    "make jokes.\n"
    "- StableLM will refuse to participate in anything that could harm a human.\n"
)

_BEGIN, _END = Token("<s>"), Token("</s>")
_END_OF_TEXT = Token("<|endoftext|>")
_IM_START, _IM_END = Token("<|im_start|>"), Token("<|im_end|>")
_SYSTEM, _USER, _ASSISTANT = Token("<|system|>"), Token("<|user|>"), Token("<|assistant|>")
# Baichuan's generation_config.json fixes the ids; the strings differ between its two vocabularies.
_BAICHUAN = {
    "": (Token("<reserved_102>", 195), Token("<reserved_103>", 196)),
    "2": (Token("<reserved_106>", 195), Token("<reserved_107>", 196)),
}


_LLAMA_2 = Turns(
    system="<<SYS>>\n{system}\n<</SYS>>\n\n",
    user="[INST] {question} [/INST]",
    assistant=(" {answer} ", _END),
    user_again=(_BEGIN, "[INST] {question} [/INST]"),
    system_goes_inside=True,
)
_ALPACA_2 = "You are a helpful assistant. 你是一个乐于助人的助手。请你提供专业、有逻辑、内容真实、有价值的详细回复。"

# THUDM, modeling_chatglm.py: process_response. The first release also widens punctuation beside Chinese characters.
_CHATGLM_RULES = ((r"^\s+|\s+$", ""), (r"\[\[训练时间\]\]", "2023年"))
_WIDE = tuple(zip(",!:;?", "，！：；？", strict=True))
_CHATGLM_UNSETTLED = r"\s+|\[(?:\[(?:训(?:练(?:时(?:间\]?)?)?)?)?)?"
_BESIDE_CHINESE = tuple(
    rule
    for half, wide in _WIDE
    for rule in ((rf"([\u4e00-\u9fff])\{half}", rf"\1{wide}"), (rf"\{half}([\u4e00-\u9fff])", rf"{wide}\1"))
)

# ChatGLM3 and GLM-4: role token, a line for metadata (empty here), content; the last two encoded each on its own.
_GLM_ROLES = Turns(
    system=(_SYSTEM, "\n", CUT, "{system}"),
    user=(_USER, "\n", CUT, "{question}", _ASSISTANT),
    assistant=("\n", CUT, "{answer}"),
    stops=(_USER, Token("<|observation|>"), _END_OF_TEXT, _END),
    finish=Finish(_CHATGLM_RULES, unsettled=_CHATGLM_UNSETTLED),
)

FORMATS: dict[str, Prompt] = {
    "raw": Raw(),
    "chat-template": ChatTemplate(),
    # Stanford Alpaca, train.py: PROMPT_DICT
    "alpaca": Instruction(
        plain=f"{_ALPACA}. {_ALPACA_REQUEST}\n\n### Instruction:\n{{question}}\n\n### Response:",
        with_input=(
            f"{_ALPACA}, paired with an input that provides further context. {_ALPACA_REQUEST}\n\n"
            "### Instruction:\n{question}\n\n### Input:\n{input}\n\n### Response:"
        ),
    ),
    # Chinese-LLaMA-Alpaca, scripts/inference/inference_hf.py
    "chinese-alpaca": Instruction(
        plain=f"{_ALPACA}. {_ALPACA_REQUEST}\n\n### Instruction:\n\n{{question}}\n\n### Response:\n\n",
        with_input=f"{_ALPACA}. {_ALPACA_REQUEST}\n\n### Instruction:\n\n{{question}}\n{{input}}\n\n### Response:\n\n",
    ),
    # FastChat, conversation.py: zero_shot, the text that the weights of March 2023 (v0) were trained on
    "vicuna-v0": Turns(
        system="{system}\n",
        default_system=_VICUNA.replace("{who}", "human"),
        user="### Human: {question}\n### Assistant:",
        assistant=" {answer}\n",
        stops=("###",),
    ),
    # FastChat, conversation.py: vicuna_v1.1 (v1.1 to v1.5)
    "vicuna": Turns(
        system="{system} ",
        default_system=_VICUNA.replace("{who}", "user"),
        user="USER: {question} ASSISTANT:",
        assistant=(" {answer}", _END),
    ),
    # Meta, llama/generation.py: chat_completion; the first <s> is the tokenizer's
    "llama-2-chat": _LLAMA_2,
    # Chinese-LLaMA-Alpaca-2, README; FastChat: chinese-alpaca2
    "chinese-alpaca-2": replace(_LLAMA_2, default_system=_ALPACA_2),
    # THUDM, modeling_chatglm.py: chat; [gMASK] and <sop> are the tokenizer's
    "chatglm": Turns(
        user="[Round {round}]\n问：{question}\n答：",
        assistant="{answer}\n",
        lone_user="{question}",
        finish=Finish((*_CHATGLM_RULES, *_BESIDE_CHINESE), unsettled=rf"{_CHATGLM_UNSETTLED}|[,!:;?]"),
    ),
    # THUDM, modeling_chatglm.py of ChatGLM2-6B: build_inputs
    "chatglm2": Turns(
        user="[Round {round}]\n\n问：{question}\n\n答：",
        assistant="{answer}\n\n",
        first_round=1,
        finish=Finish(_CHATGLM_RULES, unsettled=_CHATGLM_UNSETTLED),
    ),
    # THUDM, tokenization_chatglm.py of ChatGLM3-6B: build_chat_input; stop ids as FastChat's chatglm3
    "chatglm3": _GLM_ROLES,
    # THUDM, tokenization_chatglm.py of GLM-4-9B: build_chat_input
    "glm-4": _GLM_ROLES,
    # Qwen-7B-Chat, qwen_generation_utils.py: make_context, get_stop_words_ids; each part is encoded on its own
    "qwen-chat": Turns(
        system=(_IM_START, "system", CUT, "\n", CUT, "{system}", _IM_END, "\n"),
        default_system="You are a helpful assistant.",
        user=(_IM_START, "user", CUT, "\n", CUT, "{question}", _IM_END, "\n", _IM_START, "assistant", CUT, "\n"),
        assistant=(CUT, "{answer}", _IM_END, "\n"),
        stops=(_IM_END, _IM_START),
    ),
    # Baichuan-13B, modeling_baichuan.py: _build_chat_input
    "baichuan-chat": Turns(
        user=(_BAICHUAN[""][0], "{question}", _BAICHUAN[""][1]), assistant=("{answer}", _END), stops=_BAICHUAN[""]
    ),
    # Baichuan2, generation_utils.py: build_chat_input
    "baichuan2-chat": Turns(
        system="{system}",
        user=(_BAICHUAN["2"][0], "{question}", _BAICHUAN["2"][1]),
        assistant="{answer}",
        stops=_BAICHUAN["2"],
    ),
    # BELLE, train and inference scripts
    "belle": Turns(user="Human: \n{question}\n\nAssistant: \n", assistant="{answer}\n\n", stops=("\n\nHuman:",)),
    # BELLE-7B-2M, model card and GPTQ script
    "belle-2m": Turns(user="Human: {question}\n\nAssistant:", assistant="{answer}\n\n", stops=("\n\nHuman:",)),
    # OpenBuddy before 21.1, README: prompt format
    "openbuddy": Turns(
        system="{system}\n\n",
        default_system=_BUDDY,
        user="User: {question}\nAssistant:",
        assistant=" {answer}\n",
        stops=("\nUser:",),
    ),
    # FastChat, conversation.py: baize, after demo/app.py of project-baize
    "baize": Turns(
        system="{system}[|Human|]Hello!\n[|AI|]Hi!\n",
        default_system=_BAIZE,
        user="[|Human|]{question}\n[|AI|]",
        assistant="{answer}\n",
        stops=("[|Human|]", "[|AI|]"),
    ),
    # EasyLM, docs/koala.md; FastChat: koala_v1
    "koala": Turns(
        system="{system} ",
        default_system="BEGINNING OF CONVERSATION:",
        user="USER: {question} GPT:",
        assistant=(" {answer}", _END),
    ),
    # FastChat, conversation.py: phoenix
    "phoenix": Turns(
        system="{system}\n\n",
        default_system=_VICUNA.replace("{who}", "human"),
        user=("Human: ", _BEGIN, "{question}", _END, "Assistant: ", _BEGIN),
        assistant=("{answer}", _END),
    ),
    # RedPajama-INCITE-Chat, model card
    "redpajama-chat": Turns(user="<human>: {question}\n<bot>:", assistant=" {answer}\n", stops=("<human>",)),
    # Open-Assistant, model cards of the Pythia and the LLaMA models
    "oasst": Turns(
        user=(Token("<|prompter|>"), "{question}", _END_OF_TEXT, _ASSISTANT), assistant=("{answer}", _END_OF_TEXT)
    ),
    "oasst-llama": Turns(user=(Token("<|prompter|>"), "{question}", _END, _ASSISTANT), assistant=("{answer}", _END)),
    # StableLM-Tuned-Alpha, model card; its stop ids are those of the roles and of the two tokens after them
    "stablelm-tuned": Turns(
        system=(Token("<|SYSTEM|>"), "{system}"),
        default_system=_STABLELM,
        user=(Token("<|USER|>"), "{question}", Token("<|ASSISTANT|>")),
        assistant="{answer}",
        stops=(Token("<|USER|>"), Token("<|ASSISTANT|>"), Token("<|SYSTEM|>"), Token("<|padding|>"), _END_OF_TEXT),
    ),
    # Falcon-7B-Instruct and 40B-Instruct, model cards; Falcon-180B-chat, its demo
    "falcon-instruct": Turns(
        system="{system}\n", user="User: {question}\nAssistant:", assistant=" {answer}\n", stops=("\nUser",)
    ),
    "falcon-180b-chat": Turns(
        system="System: {system}\n", user="User: {question}\nFalcon:", assistant=" {answer}\n", stops=("\nUser:",)
    ),
    # ChatRWKV, model cards of Raven and World
    "rwkv-raven": Turns(
        user="Bob: {question}\n\nAlice:", assistant=" {answer}\n\n", joins_paragraphs=True, stops=("\n\n",)
    ),
    "rwkv-world": Turns(
        user="User: {question}\n\nAssistant:", assistant=" {answer}\n\n", joins_paragraphs=True, stops=("\n\n",)
    ),
}


def name_of(prompt: Prompt) -> str:
    """The name of a format; `own` for one that a plugin brings."""
    return next((name for name, known_format in FORMATS.items() if known_format == prompt), "own")


def choose_prompt(name: str | None, *, has_chat_template: bool, family: Prompt | None = None) -> Prompt:
    """The format to use: the one named, else the checkpoint's own template, else the family's, else raw text.

    Raises:
        InputError: no format of that name, or a chat template is asked for and the checkpoint has none.
    """
    if name is None:
        return ChatTemplate() if has_chat_template else (family or Raw())
    if name not in FORMATS:
        raise InputError(
            f"unknown prompt format {name!r}", hint=suggestion(name, FORMATS, f"one of {', '.join(FORMATS)}")
        )
    if isinstance(FORMATS[name], ChatTemplate) and not has_chat_template:
        raise InputError(
            "this checkpoint has no chat template",
            hint="use --chat-template raw, or another format: " + ", ".join(FORMATS),
        )
    return FORMATS[name]
