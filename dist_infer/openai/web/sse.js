// Server-sent events of one response.

import { isLost, unreachable, Refused } from "./api.js";

/** Each event's data, up to [DONE]. Refused when the connection ends before it. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      rest += value;
      const parts = rest.split(/\r?\n\r?\n/);
      rest = parts.pop();
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "[DONE]") return;
        if (data !== "") yield data;
      }
    }
  } catch (error) {
    throw isLost(error) ? unreachable() : error;
  } finally {
    reader.cancel().catch(() => {}); // it may have failed already
  }
  throw new Refused({
    message: "The connection ended before the answer did.",
    advice: "Check that the server is running, then regenerate the answer.",
  });
}

function dataOf(event) {
  const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}
