/**
 * Scenarios of how a server ends, and of what it keeps.
 *
 * @module
 */

import {
  CLOSED,
  inPython,
  inPythonOneByOne,
  isOneByOne,
  isSideBySide,
  isTcp,
  type Scenario,
  SERVED,
  type Step,
} from "./scenario.ts";

export const ENDINGS: Scenario[] = [
  // The end
  {
    name: "close right after constructing",
    handler: "echo",
    manual: true,
    steps: [["server", "does", "server_close"], ["server", "is dialed"]],
    differs: [{
      reason: "a constructor opens nothing here; listen() does, and serveForever() calls it",
      python: ["server: server_bind"],
      here: [],
    }],
  },
  {
    name: "the context manager ends the server",
    handler: "echo",
    manual: true,
    steps: [["server", "listens"], ["server", "does", "with"], ["server", "is dialed"]],
    differs: [{
      reason: "await using drains as shutdown() does, and closes; with only closes",
      python: ["server: server_close"],
      here: ["server: shutdown"],
    }],
  },
  {
    name: "shutdown ends serve_forever, and close frees the address",
    handler: "raw lines",
    steps: [
      ["a", "connects"],
      ["a", "sends", "hello\n"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["server", "does", "shutdown"],
      ["server", "is past", "serve_forever returned"],
      ["server", "does", "server_close"],
      ["server", "is dialed"],
    ],
  },
  {
    name: "shutdown right after the start, twenty times",
    handler: "echo",
    on: isTcp,
    manual: true,
    steps: [["server", "listens"], ["server", "does", "start and stop 20"]],
  },
  {
    name: "shutdown before the start",
    handler: "echo",
    manual: true,
    steps: [
      ["server", "listens"],
      ["server", "begins", "shutdown"],
      ["server", "is asked about", "shutdown", inPython],
      ["server", "does", "serve_forever"],
      ["server", "is past", "shutdown returned"],
    ],
    differs: [{
      reason: "Python's shutdown() waits for a serve_forever() that may never come; here the server is over at once",
      python: ["server: shutdown goes on"],
      here: ["server: shutdown is over"],
    }],
  },
  {
    name: "shutdown while a client is served",
    handler: "raw lines",
    steps: [
      ["a", "connects"],
      ["a", "sends", "one\n"],
      ["a", "reads", 4],
      ["server", "begins", "shutdown"],
      ["server", "is asked about", "shutdown", inPythonOneByOne],
      ["a", "sends", "two\n"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["server", "is past", "shutdown returned"],
    ],
    differs: [{
      reason: "shutdown() drains here: a client that has nothing under way is ended",
      python: ['a: received "one\\ntwo\\n", then the end'],
      here: ['a: received "one\\n", then the end'],
    }, {
      on: isOneByOne,
      reason: "Python's loop waits for the one client, however long it stays",
      python: ["server: shutdown goes on"],
      here: ["server: shutdown is over"],
    }],
  },
  {
    name: "shutdown while a client waits in the backlog",
    on: isOneByOne,
    handler: "raw lines",
    steps: [
      ["a", "connects"],
      ["a", "sends", "one\n"],
      ["a", "reads", 4],
      ["b", "connects"],
      ["b", "sends", "two\n"],
      ["b", "half-closes"],
      ["server", "begins", "shutdown"],
      ["server", "is asked about", "shutdown", inPython],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["server", "is past", "shutdown returned"],
      ["server", "does", "server_close"],
      ["b", "reads to the end"],
    ],
    differs: [{
      reason: "shutdown() serves here who has connected before it; Python resets them when it closes",
      python: ["b:", 'b: received "", then a reset', "server: shutdown goes on"],
      here: [`b: ${SERVED} ${CLOSED}`, 'b: received "two\\n", then the end', "server: shutdown is over"],
    }],
  },
  {
    name: "shutdown from inside a handler",
    handler: "shuts down",
    steps: [["a", "connects"], ["a", "sends", "go\n"], ["a", "reads to the end"], [
      "server",
      "is past",
      "serve_forever returned",
    ]],
    differs: [{
      on: isOneByOne,
      reason:
        "Python's handler runs in the loop that shutdown() waits for, a deadlock; here a handler calls it without await",
      python: ['a: received "waits for ever\\n", then the end'],
      here: ['a: received "returned\\n", then the end'],
    }],
  },
  {
    name: "serve_forever again after shutdown",
    handler: "greet and go",
    steps: [
      ["server", "does", "shutdown"],
      ["server", "is past", "serve_forever returned"],
      ["server", "is dialed"],
    ],
    differs: [{
      reason:
        "shutdown() closes the address here, and a server is served once; Python's clients wait for nobody in the backlog until server_close()",
      python: ["server: lets clients in"],
      here: ["server: lets nobody in"],
    }],
  },
  {
    name: "close while a client is served",
    on: isSideBySide,
    handler: "greet",
    steps: [
      ["a", "connects"],
      ["a", "reads", 6],
      ["server", "does", "shutdown"],
      ["server", "begins", "server_close"],
      ["server", "is asked about", "server_close", inPython],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["server", "is past", "server_close returned"],
    ],
    differs: [{
      reason:
        "close() cuts off, after shutdown() has let handlers finish; server_close() waits for their threads for ever",
      python: ["server: server_close goes on"],
      here: ["server: server_close is over"],
    }],
  },
  {
    name: "a restart at the same address right after the end",
    handler: "greet and go",
    steps: [
      ["a", "connects"],
      ["a", "reads to the end"],
      ["a", "closes"],
      ["server", "does", "shutdown"],
      ["server", "does", "server_close"],
      ["server", "restarts"],
    ],
    differs: [{
      reason: "the address is free here when shutdown() resolves: SO_REUSEADDR is set, and a socket file is removed",
      python: ["server: construct throws EADDRINUSE", "server: server_close"],
      here: [],
    }],
  },

  // Nothing is kept
  {
    name: "a hundred servers that cannot bind keep no descriptor",
    handler: "echo",
    manual: true,
    steps: [["server", "listens"], ["server", "does", "fail to bind"]],
  },
  {
    name: "handlers and descriptors of clients that have left are given back",
    handler: "raw lines",
    steps: [
      ["server", "does", "remember descriptors"],
      ...Array.from({ length: 10 }, (_, i): Step[] => [
        [`client ${i}`, "connects"],
        [`client ${i}`, "sends", "hello\n"],
        [`client ${i}`, "half-closes"],
        [`client ${i}`, "reads to the end"],
        [`client ${i}`, "closes"],
        [`client ${i}`, "is past", "close_request"],
      ]).flat(),
      ["server", "does", "compare descriptors"],
      ["server", "does", "count handlers"],
    ],
  },
];
