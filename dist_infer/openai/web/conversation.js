// The messages of one chat, kept in this tab's storage until it is closed or a new chat begins.

const PLACE = "dist-infer.conversation";

export class Conversation {
  /** Messages are {role: "user", content}, answers (answer.js) or {role: "tool", id, content}. */
  constructor(messages = []) {
    this.messages = messages;
  }

  static kept() {
    try {
      const messages = JSON.parse(sessionStorage.getItem(PLACE) ?? "[]");
      return new Conversation(Array.isArray(messages) ? messages : []);
    } catch {
      return new Conversation(); // written by another version
    }
  }

  /** False when the tab's storage is full: then a reload shows what was kept before. */
  keep() {
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(this.messages));
      return true;
    } catch {
      return false;
    }
  }

  get last() {
    return this.messages.at(-1) ?? null;
  }

  add(message) {
    this.messages.push(message);
  }

  /** Take away the last answer, whole or broken off, so that it can be asked for again. */
  dropAnswer() {
    while (this.last !== null && this.last.role === "assistant") this.messages.pop();
  }

  /** Take away the last message of the user with all that followed, and return its text. */
  dropTurn() {
    while (this.messages.length > 0) {
      const message = this.messages.pop();
      if (message.role === "user") return message.content;
    }
    return "";
  }

  /** As the API takes them. Reasoning is not sent back; what was asked in vain is left out once there is a new turn. */
  asSent(system) {
    const sent = system ? [{ role: "system", content: system }] : [];
    for (const message of this.messages) {
      if (message.role === "user") {
        if (sent.at(-1)?.role === "user") sent.pop(); // templates want turns
        sent.push({ role: "user", content: message.content });
      } else if (message.role === "tool") {
        sent.push({ role: "tool", tool_call_id: message.id, content: message.content });
      } else if (message.content || message.calls.length > 0) {
        sent.push(answerAsSent(message));
      }
    }
    return sent;
  }
}

function answerAsSent({ content, calls }) {
  if (calls.length === 0) return { role: "assistant", content };
  const tool_calls = calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role: "assistant", content: content || null, tool_calls };
}
