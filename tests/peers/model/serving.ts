/**
 * Scenarios of hooks, of clients that leave, of several clients, and of `handle_request`.
 *
 * @module
 */

import {
  CLOSED,
  isOneByOne,
  isSideBySide,
  isTcp,
  type Scenario,
  SERVED,
  whereHandlersAreWaitedFor,
} from "./scenario.ts";

export const SERVING: Scenario[] = [
  // Hooks
  {
    name: "setup, handle and finish share their object, and finish can still write",
    handler: "setup and finish",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "setup throws: neither handle nor finish runs",
    handler: "throws in setup",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "handle throws: finish runs, handle_error is told, the next client is served",
    handler: "throws in handle",
    steps: [["a", "connects"], ["a", "reads to the end"], ["b", "connects"], ["b", "reads to the end"]],
  },
  {
    name: "finish throws",
    handler: "throws in finish",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "handle and finish throw",
    handler: "throws in both",
    steps: [["a", "connects"], ["a", "reads to the end"]],
    differs: [{
      reason: "both errors are told here, none hides the other",
      python: [`a: ${SERVED} handle_error(finish fails) ${CLOSED}`],
      here: [`a: ${SERVED} handle_error(handle fails) handle_error(finish fails) ${CLOSED}`],
    }],
  },
  {
    name: "handle raises SystemExit",
    handler: "exits",
    steps: [["a", "connects"], ["a", "reads to the end"], ["a", "is past", "close_request"]],
    differs: [{
      reason: "JavaScript has no exceptions that mean to end the program, so all are told; Deno.exit() ends it",
      python: [`a: ${SERVED} ${CLOSED}`],
      here: [`a: ${SERVED} handle_error(exit) ${CLOSED}`],
    }, {
      on: isOneByOne,
      reason: "no handler ends the server here",
      python: ["server: serve_forever throws exit"],
      here: [],
    }],
  },
  {
    name: "verify_request says no: no handler is made, and the connection is closed",
    handler: "greet",
    quirk: "verify_request says no",
    steps: [["a", "connects"], ["a", "reads to the end"], ["b", "connects"], ["b", "reads to the end"]],
  },
  {
    name: "verify_request says no to a client that has spoken already",
    handler: "greet",
    quirk: "verify_request says no",
    manual: true,
    steps: [
      ["server", "listens"],
      ["a", "connects"],
      ["a", "sends", "hello"],
      ["server", "does", "handle_request"],
      ["a", "is past", "close_request"],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "verify_request throws",
    handler: "greet",
    quirk: "verify_request throws",
    steps: [["a", "connects"], ["a", "reads to the end"]],
    differs: [{
      reason: "a hook that throws ends its own connection here, and not the server",
      python: ["a: get_request verify_request", "server: serve_forever throws verify_request fails"],
      here: [`a: get_request verify_request handle_error(verify_request fails) ${CLOSED}`],
    }],
  },
  {
    name: "get_request throws",
    handler: "greet",
    quirk: "get_request throws",
    steps: [["a", "connects"], ["a", "reads to the end"]],
    differs: [{
      reason: "Python takes an OSError here for a client that has left, and says nothing",
      python: ["a: get_request"],
      here: ["a: get_request handle_error(get_request fails)"],
    }],
  },
  {
    name: "process_request throws",
    handler: "greet",
    quirk: "process_request throws",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "process_request puts the request aside and returns",
    handler: "greet",
    quirk: "process_request puts aside",
    steps: [
      ["a", "connects"],
      ["a", "is past", "process_request"],
      ["server", "does", "aside"],
      ["a", "reads to the end"],
    ],
    differs: [{
      reason:
        "a connection is closed when processRequest() settles, so nobody can forget it; a pool or a queue is awaited inside",
      python: ['a: received "later\\n", then the end', "server: aside returned"],
      here: ['a: received "", then the end', "server: aside throws The stream is closed"],
    }],
  },
  {
    name: "handle_error throws",
    handler: "throws in handle",
    quirk: "handle_error throws",
    steps: [["a", "connects"], ["a", "reads to the end"]],
    differs: [{
      on: isOneByOne,
      reason: "a hook that throws ends its own connection here, and not the server",
      python: [`a: ${SERVED} handle_error(handle fails)`, "server: serve_forever throws handle_error fails"],
      here: [`a: ${SERVED} handle_error(handle fails) ${CLOSED}`],
    }],
  },
  {
    name: "service_actions runs while the server serves",
    handler: "echo",
    quirk: "service_actions counts",
    steps: [["server", "is past", "service_actions"]],
  },
  {
    name: "service_actions throws",
    handler: "greet and go",
    quirk: "service_actions throws",
    on: isTcp,
    steps: [["server", "is past", "service_actions"]],
    differs: [{
      reason: "chores that fail are told on the console here, and the server goes on",
      python: ["server: serve_forever throws service_actions fails"],
      here: [],
    }],
  },

  // Clients that leave
  {
    name: "a client leaves in the middle of a line",
    // On a Unix socket it is a matter of chance whether Python can still write.
    on: isTcp,
    handler: "raw lines",
    steps: [["a", "connects"], ["a", "sends", "half a li"], ["a", "closes"], ["a", "is past", "close_request"]],
    differs: [
      {
        reason: "half a record is no record here; Python's handler answers it, and nobody notices that it was cut",
        python: [`a: ${SERVED} ${CLOSED}`],
        here: [`a: ${SERVED} handle_error(IncompleteReadError) ${CLOSED}`],
      },
    ],
  },
  {
    name: "a client resets while the handler waits for it",
    // On a Unix socket it is a matter of chance whether the kernel tells the end or the reset.
    on: isTcp,
    handler: "greet",
    steps: [["a", "connects"], ["a", "reads", 3], ["a", "resets"], ["a", "is past", "close_request"]],
  },
  {
    name: "a client leaves while the handler writes to it",
    handler: "flood",
    steps: [
      ["a", "connects"],
      ["a", "reads", 6],
      ["a", "sends", "go on\n"],
      ["a", "reads", 1],
      ["a", "closes"],
      ["a", "is past", "close_request"],
    ],
  },
  {
    name: "a client resets before it is accepted",
    handler: "echo",
    on: isTcp,
    manual: true,
    steps: [
      ["server", "listens"],
      ["a", "comes and resets"],
      ["server", "begins", "serve_forever"],
      ["b", "connects"],
      ["b", "half-closes"],
      ["b", "reads to the end"],
    ],
    differs: [{
      reason: "the runtime's accept() gives out no connection that is gone; stats.lost counts it",
      python: [`a: ${SERVED} handle_error(the peer is gone) ${CLOSED}`],
      here: ["a:"],
    }],
  },

  // More than one client
  {
    name: "one by one: the second client is served when the first has left",
    on: isOneByOne,
    handler: "greet",
    ordered: true,
    steps: [
      ["a", "connects"],
      ["a", "reads", 6],
      ["b", "connects"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["b", "reads", 6],
      ["b", "half-closes"],
      ["b", "reads to the end"],
    ],
  },
  {
    name: "side by side: the second client is served while the first is there",
    on: isSideBySide,
    handler: "greet",
    steps: [
      ["a", "connects"],
      ["a", "reads", 6],
      ["b", "connects"],
      ["b", "reads", 6],
      ["b", "half-closes"],
      ["b", "reads to the end"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
    ],
  },

  // handle_request
  {
    name: "handle_request serves one client, then the next call the next",
    handler: "greet and go",
    manual: true,
    steps: [
      ["server", "listens"],
      ["a", "connects"],
      ["b", "connects"],
      ["server", "does", "handle_request"],
      ["a", "reads to the end"],
      ["server", "does", "handle_request"],
      ["b", "reads to the end"],
    ],
  },
  {
    name: "handle_request with a timeout calls handle_timeout when nobody comes, and the next one serves",
    handler: "greet and go",
    manual: true,
    steps: [
      ["server", "listens"],
      ["server", "does", "handle_request", { timeout: 20 }],
      ["a", "connects"],
      ["server", "does", "handle_request", { timeout: 5_000 }],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "handle_request while its handler is busy",
    handler: "greet",
    manual: true,
    steps: [
      ["server", "listens"],
      ["a", "connects"],
      ["server", "begins", "handle_request"],
      ["a", "reads", 6],
      ["server", "is asked about", "handle_request", whereHandlersAreWaitedFor],
      ["a", "half-closes"],
      ["a", "reads to the end"],
      ["server", "is past", "handle_request returned"],
    ],
    differs: [{
      on: isSideBySide,
      reason: "handleRequest() resolves when its request is over; Python's thread is left to itself",
      python: ["server: handle_request is over"],
      here: ["server: handle_request goes on"],
    }],
  },
];
