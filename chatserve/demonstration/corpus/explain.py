"""What the model can explain: chatserve, in whole paragraphs.

Each topic has the words that users use for it, an explanation, and one that goes deeper for a
follow-up.  The texts are fixed: the model learns them by heart, the questions vary.
"""

from dataclasses import dataclass

from chatserve.demonstration.corpus.draw import Draw, Turn
from chatserve.demonstration.corpus.recall import loosen


@dataclass(frozen=True)
class Topic:
    """A subject, its names, questions of its own, and the two texts."""

    names: tuple[str, ...]
    questions: tuple[str, ...]
    text: str
    more: str


GENERAL = (
    "What is {n}?",
    "Explain {n}.",
    "What are {n}?",
    "Can you explain {n}?",
    "Tell me about {n}.",
    "How does {n} work?",
    "How do {n} work?",
    "Please explain {n} to me.",
    "Describe {n}.",
    "What do you mean by {n}?",
    "What does {n} mean?",
    "I want to understand {n}.",
    "{n}?",
    "Could you tell me what {n} is?",
    "Explain {n} in simple words.",
    "What is meant by {n}?",
    "I don't understand {n}. Can you help?",
    "Why is there {n}?",
    "Talk to me about {n}.",
    "What can you tell me about {n}?",
    "Give me an explanation of {n}.",
    "How about {n}?",
    "I would like to know about {n}.",
    "Teach me about {n}.",
    "Write a paragraph about {n}.",
)
MORE = (
    "Tell me more.",
    "Can you say more?",
    "More, please.",
    "Go on.",
    "And then?",
    "Please continue.",
    "Can you go deeper?",
    "I want to know more.",
    "More details, please.",
    "Explain more.",
    "What else?",
    "Say more about that.",
    "Continue.",
    "Could you add some detail?",
    "tell me more",
)

TOPICS = (
    Topic(
        ("chatserve", "this server", "this program", "this chat server"),
        (
            "What does chatserve do?",
            "What software is this?",
            "What is this page?",
            "What runs here?",
            "What am I talking to, technically?",
            "Why should I use chatserve?",
        ),
        "**chatserve** is a chat server for language models that never reads a conversation twice. "
        "It keeps what the model computed for every token, in small *pages*, and finds those pages "
        "again when the conversation goes on. So the next turn costs only its new tokens, even in a "
        "long chat, and even after a restart.",
        "Three things work together in chatserve:\n\n"
        "- **Pages** hold the keys and values of a few tokens each.\n"
        "- **The prefix cache** finds pages that were computed before.\n"
        "- **Tiers** keep idle pages in memory or on disk until they are needed again.",
    ),
    Topic(
        ("a page", "pages", "KV pages", "a KV page", "the pages", "paged attention"),
        (
            "How is the KV cache stored?",
            "Why pages?",
            "What is stored in a page?",
            "How big is a page?",
            "What is the page size?",
        ),
        "A **page** holds the keys and values of a short run of tokens, 16 by default, for all layers "
        "of the model. A conversation is a list of pages, its page table. Pages can lie anywhere in "
        "memory, so no space is lost between conversations, and two conversations can share a page.",
        "A full page is *sealed*: it never changes again. It gets a name that is computed from all "
        "tokens before it and in it. Two pages with the same name hold the same content, so a page "
        "that was computed once can be used by everyone who may see it.",
    ),
    Topic(
        ("the prefix cache", "prefix caching", "a prefix cache", "the cache", "cached tokens"),
        (
            "Why is the second turn faster?",
            "How do you avoid reading a chat twice?",
            "What happens with a long system prompt?",
            "Why are long chats fast?",
            "What are cache hits?",
        ),
        "The **prefix cache** finds work that was done before. When a message arrives, chatserve looks "
        "for the longest beginning of the conversation whose pages it still has. Those tokens are not "
        "computed again. Only the new tokens go through the model, so a long chat answers as quickly "
        "as a short one.",
        "Many chats begin with the same system prompt. Its pages are computed once and shared by all "
        "of them. The same holds when you regenerate a reply or go back and ask something else: the "
        "common beginning is already there.",
    ),
    Topic(
        ("copy-on-write", "copy on write", "forking", "branches", "branching"),
        (
            "What happens when I ask for several replies?",
            "How do several samples share memory?",
            "What happens when I edit a message?",
            "How can two chats share a page?",
        ),
        "With **copy-on-write**, several replies can start from one conversation without copying it. "
        "They share all full pages. Only the last page, which is still being filled, is copied when "
        "one of them writes to it. So four answers to a long question need little more memory than one.",
        "Each page counts how many conversations use it. A page with more than one user is never "
        "written to: the writer gets a copy first. When the last user leaves, the page stays in the "
        "cache until its place is needed.",
    ),
    Topic(
        ("swap", "swapping", "the tiers", "tiers", "swap to disk", "offloading", "host memory"),
        (
            "What happens when memory is full?",
            "What happens to idle chats?",
            "Where do old chats go?",
            "What if there is no room for a page?",
            "What does the disk do?",
        ),
        "When the memory of the device is full, chatserve moves pages of idle chats away: first to "
        "**main memory**, then to **disk**. When the chat goes on, its pages are brought back, which is "
        "much faster than computing them again. Nothing is lost if a page is dropped: the text is "
        "kept, and pages can always be computed from it.",
        "The tiers, from fast to slow:\n\n"
        "1. **Device**: the pages in use.\n"
        "2. **Host**: main memory, for chats that pause.\n"
        "3. **Disk**: for chats that sleep, and for restarts.\n\n"
        "Each tier has a limit, and the pages that were not used for the longest time leave first.",
    ),
    Topic(
        ("a restart", "restarting", "the restart", "persistence", "crash recovery", "a crash"),
        (
            "What happens after a restart?",
            "Do you remember after a restart?",
            "Is my chat saved?",
            "What if the server crashes?",
            "Can I restart the server?",
            "What happens if it is killed?",
        ),
        "After a **restart**, chatserve finds its pages on disk again. Your chat is still there, and "
        "the next turn reads its pages from disk instead of computing the whole conversation. This "
        "also works after a crash: every page is checked when it is read, and a damaged page is "
        "simply computed again.",
        "The text of the chats is stored too, so a reply that was cut off by a crash can go on where "
        "it stopped. The rule is: *text is the truth, pages are a cache*. Losing a page costs time, "
        "never an answer.",
    ),
    Topic(
        ("a real model", "a bigger model", "another model", "loading a model", "other models"),
        (
            "How do I load a real model?",
            "How can I use another model?",
            "How do I use a better model?",
            "Can you run a bigger model?",
            "How do I serve my own model?",
            "Can I use Llama?",
            "How do I start chatserve with a model?",
            "How do I change the model?",
            "Which models work?",
            "How do I use a model from the hub?",
            "How do I load a model from Hugging Face?",
            "I want a smarter model.",
            "How do I start the server?",
            "How do I run chatserve?",
        ),
        "To use a real model, give its folder or its hub id when you start the server:\n\n"
        "```bash\nchatserve serve MODEL_FOLDER\nchatserve serve Qwen/Qwen3-0.6B\n```\n\n"
        "The folder must hold a model in the Hugging Face format: `config.json`, the weights as "
        "safetensors, and the tokenizer. Without an argument the server starts with me, the small "
        "demonstration model.",
        "Useful options when you start it:\n\n"
        "- `--port 8000` chooses the port.\n"
        "- `--device cuda` uses a GPU.\n"
        "- `--data-dir DIR` says where chats and pages are kept.\n\n"
        "All options are shown by `chatserve serve --help`.",
    ),
    Topic(
        ("the KV cache", "a KV cache", "keys and values", "attention"),
        (
            "Why does a model need a cache?",
            "What does the model store for each token?",
            "What is kept for each token?",
        ),
        "A language model turns every token into **keys** and **values**, which later tokens look at. "
        "Keeping them is called the KV cache. Without it, each new token would need the whole text to "
        "be computed again. chatserve keeps them in pages, so that they can be shared, moved and found.",
        "The KV cache grows with every token, in every layer. For a big model, one long chat can take "
        "gigabytes. That is why chatserve shares pages between chats and moves idle ones away.",
    ),
    Topic(
        ("streaming", "the streaming", "tokens", "a token"),
        (
            "Why do the words appear one by one?",
            "How are replies sent?",
            "Why does the text flow in?",
        ),
        "A model writes one **token** at a time. A token is a word or a part of a word. chatserve sends "
        "each one to your browser as soon as it is made, which is called *streaming*. If the connection "
        "breaks, the page connects again and continues at the right place.",
        "Many chats are computed together in one step, which is called *batching*. Each chat gets its "
        "next token from the same pass through the model, so many people can be served at once.",
    ),
    Topic(
        ("the API", "an API", "the OpenAI API", "the client"),
        (
            "How do I call this server from Python?",
            "Can I use the OpenAI client?",
            "How do I use the API?",
            "Show me how to call you from code.",
            "Is there an API?",
        ),
        "chatserve speaks the OpenAI protocol, so the usual client works:\n\n"
        "```python\nfrom openai import OpenAI\n\n"
        'client = OpenAI(base_url="http://localhost:8000/v1", api_key="none")\n'
        'messages = [{"role": "user", "content": "Hello!"}]\n'
        'reply = client.chat.completions.create(model="demonstration", messages=messages)\n'
        "print(reply.choices[0].message.content)\n```",
        "Replies can be streamed with `stream=True`, and `n=4` gives four replies to one question. The "
        "usage of each reply says how many prompt tokens came from the cache.",
    ),
)


def explain(draw: Draw) -> tuple[Turn, Topic]:
    """A question about one topic."""
    topic = draw.choice(TOPICS)
    if draw.chance(0.5):
        text = draw.pick(topic.questions)
    else:
        text = draw.wording(GENERAL, n=draw.choice(topic.names))
        text = text[0].upper() + text[1:]
    return Turn(loosen(draw, text), topic.text, "explain"), topic


def explain_more(draw: Draw, topic: Topic) -> Turn:
    """A follow-up on the topic just explained."""
    return Turn(draw.pick(MORE), topic.more, "explain more")
