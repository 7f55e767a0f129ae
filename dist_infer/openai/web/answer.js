// One answer of the model while it arrives: text, reasoning, tool calls, token counts and times.

import { ask, refusal } from "./api.js";
import { events } from "./sse.js";

/** A new answer, in the shape in which a conversation keeps it. */
export function emptyAnswer() {
  return { role: "assistant", content: "", reasoning: "", calls: [], finish: null, figures: null, error: null };
}

/**
 * Fill `answer` from the server, calling `onChange` after each piece. Refused when it goes wrong, AbortError when
 * stopped; what has arrived by then stays in `answer`.
 */
export async function receive(answer, request, signal, onChange) {
  const begun = performance.now();
  const body = { ...request, stream: true, stream_options: { include_usage: true } };
  let first = null;
  let last = null;
  let pieces = 0;
  let usage = null;
  const sum = () => {
    answer.figures = figures({ begun, first, last, pieces, usage });
  };
  try {
    const response = await ask("v1/chat/completions", { body, signal });
    for await (const data of events(response)) {
      const chunk = JSON.parse(data);
      if (chunk.error) throw refusal(chunk.error, { requestId: response.headers.get("x-request-id") ?? "" });
      if (chunk.usage) usage = chunk.usage;
      for (const choice of chunk.choices) {
        if (add(answer, choice)) {
          last = performance.now();
          first ??= last;
          pieces += 1;
        }
      }
      sum();
      onChange();
    }
  } finally {
    sum();
  }
}

/** True when there was something in it. */
function add(answer, choice) {
  const delta = choice.delta ?? {};
  answer.finish = choice.finish_reason ?? answer.finish;
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? "";
  for (const part of delta.tool_calls ?? []) {
    const call = (answer.calls[part.index] ??= { id: "", name: "", arguments: "" });
    call.id ||= part.id ?? "";
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  return Boolean(delta.content || delta.reasoning_content || delta.tool_calls?.length);
}

/** Times in seconds. Without usage (the answer was stopped) the pieces are counted: about one a token. */
function figures({ begun, first, last, pieces, usage }) {
  const tokens = usage?.completion_tokens ?? pieces;
  const spent = first === null ? 0 : (last - first) / 1000;
  return {
    promptTokens: usage?.prompt_tokens ?? null,
    tokens,
    isExact: usage !== null,
    firstToken: first === null ? null : (first - begun) / 1000,
    rate: tokens > 1 && spent > 0 ? (tokens - 1) / spent : null,
    total: (performance.now() - begun) / 1000,
  };
}
