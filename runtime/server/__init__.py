"""The OpenAI-compatible server: HTTP in front, one engine thread that owns the model behind.

protocol.py    the JSON bodies that come in and go out, and what is refused
prompts.py     bodies -> token ids, through the model's tokenizer and chat template
sequence.py    one sequence to generate: what is asked, what comes back, who listens
generation.py  the engine: a bounded queue and the thread that runs the model
sampling.py    logits -> next token, and how probable it was
routing.py     which experts a sequence's tokens were routed to
text.py        tokens -> text, piece by piece; stop strings
answers.py     the engine's pieces -> OpenAI objects, whole or as server-sent events
metrics.py     Prometheus metrics of requests and experts
errors.py      every refusal in OpenAI's error form
app.py         the routes
run.py         uvicorn around them
"""
