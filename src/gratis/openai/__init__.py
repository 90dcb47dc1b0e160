"""A client of the official OpenAI SDK that meters its own calls.

    client = gratis.openai.meter(OpenAI(), meter=meter, otherwise="refuse", output_max=2_000)
    answer = client.responses.create(model="gpt-5-2025-08-07", input="Hello")
    gratis.openai.decision(answer).verdict

Metered are chat completions, completions, responses, embeddings, images and audio, however they are called: create,
parse, stream, raw or streaming responses; and any other call that names a model. One call has one hold and one
decision, whatever the SDK's own retries. It is released where the provider refused it (4xx) or nothing could be sent;
where that is not known (a timeout, a broken connection, 5xx, a cancelled task) its hold stays and runs out by its
bound. A stream that is left early is unmeasured: decided by its bound when it is closed; one that is thrown away,
before the client's next call (on asyncio, when its loop gets to close it), or when its hold runs out. A response in
the background is decided when this client retrieves it, in this process; if it never does, its hold runs out.

Where the store fails before a call is sent, that is raised and nothing is sent; where it fails after, the answer is
returned, and who asks for its decision gets the error. Neither prompts nor answers nor keys are kept or logged.

Not metered: batches, evals, fine-tuning, assistants' runs, agents, realtime and other WebSockets, whose answers do not
tell what they took (a warning is logged once); moderations and counting tokens, which take none; nor what the provider
ran for an attempt that the SDK gave up and tried again with success. Who reads the lines of a raw stream themselves
gets it as it comes, with the usage that was asked for, and it is decided by its bound.
"""

from gratis.openai.answers import decision
from gratis.openai.calls import Refused, Switch, request
from gratis.openai.client import meter, switch

__all__ = ["Refused", "Switch", "decision", "meter", "request", "switch"]
