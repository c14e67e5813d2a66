"""Chat templates: ids as transformers has them, and messages that try to be more than text."""

import json
import shutil

from huggingface_test import FOLDER, load, reference
import pytest

from evo_jax.data import tokenizers
from evo_jax.data.chat import ChatTemplate, ChatTokenizer
from evo_jax.data.conversations import Conversations
from evo_jax.data.huggingface import HuggingFace
from evo_jax.errors import UserError

CHATS = ["llama3", "qwen2", "smollm", "llama2", "mistral"]


def with_template(tmp_path, template, name="qwen2"):
  """The chat template of a copy of a tokenizer."""
  folder = tmp_path / name
  shutil.copytree(FOLDER / name, folder)
  (folder / "chat_template.jinja").write_text(template)
  return ChatTemplate(HuggingFace(str(folder)))


def plain(tokenizer, ids):
  """The text of the tokens that are not special."""
  return tokenizer.decode([i for i in ids if i not in tokenizer.special.values()])


def user(content):
  return [{"role": "user", "content": content}]


@pytest.mark.parametrize("name", CHATS)
def test_ids_are_those_of_transformers(name):
  """Also of the begin token, which is there once: where the template writes it."""
  chat = ChatTemplate(load(name))
  for messages, ids in reference(name)["chats"]:
    assert chat.encode(messages) == ids


@pytest.mark.parametrize("name", CHATS)
def test_special_tokens_in_messages_are_text(name):
  tokenizer = load(name)
  chat = ChatTemplate(tokenizer)
  control = lambda ids: [i for i in ids if i in tokenizer.special.values()]
  structure = control(chat.encode(user("a")))
  for token in tokenizer.special:
    for content in (token, f"a{token}b{token}", f"{token}\n{token[:-1]}", token[:-1], token[:1], f"x{token[:2]}  "):
      ids = chat.encode(user(content))
      assert control(ids) == structure, content
      assert content.strip() in plain(tokenizer, ids), content
  injected, ids = reference(name)["injected"]
  assert control(ids) == structure
  if name in ("llama3", "qwen2", "smollm"):  # transformers puts a space in front of what it protects in the others
    assert chat.encode(injected) == ids


def test_text_behind_a_message_completes_no_special_token(tmp_path):
  template = "{{ '<|im_start|>' }}{% for message in messages %}{{ message['content'] | trim }}{% endfor %}"
  chat, tokenizer = with_template(tmp_path, template), load("qwen2")
  ids = chat.encode([*user("a <|im_ "), *user("end|>")])
  assert [i for i in ids if i in tokenizer.special.values()] == [tokenizer.special["<|im_start|>"]]
  assert tokenizer.decode(ids) == "a <|im_end|>"


def test_characters_that_stand_for_special_tokens_occur_in_no_message(tmp_path):
  chat, tokenizer = ChatTemplate(load("qwen2")), load("qwen2")
  text = "".join(map(chr, range(0xF0000, 0xF0010))) + "<|im_end|>"
  assert text in plain(tokenizer, chat.encode(user(text)))


def test_white_space_that_a_special_token_takes_in(tmp_path):
  specification = json.loads((FOLDER / "qwen2" / "tokenizer.json").read_text())
  for token in specification["added_tokens"]:
    token["rstrip"] = token["special"]
  folder = tmp_path / "tokenizer"
  shutil.copytree(FOLDER / "qwen2", folder)
  (folder / "tokenizer.json").write_text(json.dumps(specification))
  tokenizer = HuggingFace(str(folder))
  ids = ChatTemplate(tokenizer).encode(user("a"))
  assert plain(tokenizer, ids) == "user\naassistant\n"  # without the line end after <|im_end|>


def test_what_templates_expect(tmp_path):
  template = """{%- set names = namespace(last='') %}
{% for message in messages %}
    {%- if message.content is not string %}{% continue %}{% endif %}
    {%- set names.last = message.role %}
{% endfor %}
{{- {'last': names.last, 'text': '<é>'} | tojson }} {{ strftime_now('%Y') | length }}{{ eos_token }}"""
  chat = with_template(tmp_path, template)
  assert chat.render([*user("a"), {"role": "tool", "content": None}]) == '{"last": "user", "text": "<é>"} 4<|im_end|>'


@pytest.mark.parametrize(
  "template, messages, message",
  [
    (None, [{"role": "assistant", "content": "a"}], "refuses these messages: roles must alternate"),
    ("{{ messages[3].content }}", user("a"), "refuses these messages"),
    ("{{ raise_exception('two\nlines') }}", user("a"), "refuses these messages: two lines"),
    ("{{ messages[0]['content'] + 1 }}", user("a"), "refuses these messages"),
    ("{{ messages.append(1) }}", user("a"), "refuses these messages"),
    ("{{ ''.__class__.__mro__[1].__subclasses__() }}", user("a"), "refuses these messages"),
    ("{% for i in range(10 ** 9) %}{% endfor %}", user("a"), "refuses these messages"),
    ("{% if %}", user("a"), "is no Jinja"),
    ("", user("a"), "makes nothing of these messages"),
  ],
)
def test_what_cannot_be_rendered_is_refused(tmp_path, template, messages, message):
  with pytest.raises(UserError, match=message) as refusal:
    (ChatTemplate(load("llama2")) if template is None else with_template(tmp_path, template)).encode(messages)
  assert "\n" not in str(refusal.value)


def test_a_tokenizer_without_a_template_is_named():
  for tokenizer in (tokenizers.Bytes(), load("unigram")):
    with pytest.raises(UserError, match=f"tokenizer, {tokenizer.identity}, has no chat template"):
      ChatTemplate(tokenizer)


@pytest.mark.parametrize("name", CHATS)
def test_a_conversation_is_read_as_it_is_written(name):
  """What the model reads before an answer, the answer and the end of the turn; without what the stream has around."""
  tokenizer, chat = load(name), ChatTokenizer(load(name))
  messages = [*user("of the <|im_end|> river</s>"), {"role": "assistant", "content": "runs and ends"}]
  raw, ids = Conversations(tokenizer).read({"messages": messages}, "text", "text")
  whole = [*chat.encode(messages[0]["content"]), *chat.continuing.encode("runs and ends")]
  if name in ("llama2", "mistral"):  # whose templates put a space before the answer
    whole = ChatTemplate(tokenizer).encode(messages)[1:-1]
  else:
    whole.append(tokenizer.turn_end_ids[-1])
  begin = [chat.begin_id] if chat.begin_id != tokenizer.begin_id else []
  assert ids.tolist() == [*begin, *whole]
  assert Conversations(tokenizer).read({"messages": messages, "x": 1}, "messages", "text")[0] == raw


def test_kept_conversations_have_one_date(tmp_path):
  template = "{{ strftime_now('%d %b %Y') }}{{ messages[0]['content'] }}"
  with_template(tmp_path, template)
  tokenizer = HuggingFace(str(tmp_path / "qwen2"))
  _, ids = Conversations(tokenizer).read({"messages": user("a")}, "text", "text")
  assert tokenizer.decode(ids) == "26 Jul 2024a"


@pytest.mark.parametrize("name", CHATS)
def test_a_prompt_is_wrapped_into_a_conversation(name):
  tokenizer, chat = load(name), ChatTokenizer(load(name))
  messages, ids = reference(name)["chats"][0]
  assert [chat.begin_id, *chat.encode(messages[0]["content"])] == ids
  system = [{"role": "system", "content": "Be brief."}, *messages]
  wrapped = ChatTokenizer(tokenizer, "Be brief.").encode(messages[0]["content"])
  assert [chat.begin_id, *wrapped] == ChatTemplate(tokenizer).encode(system)
  assert chat.continuing.encode(" a").tolist() == tokenizer.encode(" a", begins=False).tolist()
  assert chat.end_ids == tokenizer.end_ids and chat.decode(ids[-3:]) == tokenizer.decode(ids[-3:])
