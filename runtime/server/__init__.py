"""The OpenAI-compatible server: HTTP in front, one engine thread that owns the model behind.

app.py         the application: routes, middleware, the engine's life
options.py     what the operator decides: keys and limits
security.py    API keys, and when a server must have one
middleware.py  request ids, the access log, the guard, bounded bodies
openapi.py     the OpenAPI page
generation_routes.py  completions, chats, responses
operation_routes.py   models, tokens, health, version, metrics
front.py       what every route that generates does
fields.py      single parameters of bodies: how they are read, what is refused
protocol.py    bodies of completions and chats
responses.py   body and objects of the responses endpoint
objects.py     the JSON objects that go out
prompts.py     bodies -> token ids, through the model's tokenizer and chat template
tools.py       tool calls in chat templates and in what the model says
sequence.py    one sequence to generate: what is asked, what comes back, who listens
generation.py  the engine: a bounded queue and the thread that runs the model
sampling.py    logits -> next token, and how probable it was
routing.py     which experts a sequence's tokens were routed to
text.py        tokens -> text, piece by piece; stop strings
answers.py     an answer on its way: from the engine's thread to the client, or cancelled
forms.py       how completions and chats are written, whole or as server-sent events
responses_form.py     how responses are
logprobs.py    log probabilities in OpenAI's two forms
metrics.py     Prometheus metrics of requests and experts
errors.py      every refusal in OpenAI's error form
run.py         uvicorn around them
"""
