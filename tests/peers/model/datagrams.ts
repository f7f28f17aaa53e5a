/**
 * Scenarios of servers of datagrams.
 *
 * @module
 */

import { isSideBySide, isUdp, MEGABYTE, type Scenario } from "./scenario.ts";

export const DATAGRAMS: Scenario[] = [
  // Datagrams
  {
    name: "a datagram is echoed",
    datagrams: true,
    handler: "echo",
    steps: [["a", "connects"], ["a", "sends", "hello"], ["a", "reads", 1], ["a", "is past", "finish"]],
  },
  {
    name: "two clients send datagrams",
    datagrams: true,
    on: isSideBySide, // One that comes while as many are served as may be is dropped here.
    handler: "echo",
    steps: [
      ["a", "connects"],
      ["a", "sends", "hello"],
      ["a", "reads", 1],
      ["a", "is past", "finish"],
      ["b", "connects"],
      ["b", "sends", "world"],
      ["b", "reads", 1],
      ["b", "is past", "finish"],
    ],
  },
  {
    name: "a handler answers by the socket itself",
    datagrams: true,
    handler: "upper",
    steps: [["a", "connects"], ["a", "sends", "hello"], ["a", "reads", 1], ["a", "is past", "finish"]],
  },
  {
    name: "an empty datagram",
    datagrams: true,
    handler: "length",
    steps: [["a", "connects"], ["a", "sends", ""], ["a", "reads", 1], ["a", "is past", "finish"]],
  },
  {
    name: "a datagram of 10,000 bytes",
    datagrams: true,
    handler: "length",
    steps: [["a", "connects"], ["a", "sends", MEGABYTE.subarray(0, 10_000)], ["a", "reads", 1], [
      "a",
      "is past",
      "finish",
    ]],
    differs: [{
      reason: "a datagram arrives whole here; Python cuts it at max_packet_size, and says nothing",
      python: ['a: received ["8192 bytes"]'],
      here: ['a: received ["10000 bytes"]'],
    }],
  },
  {
    name: "a handler that answers nothing",
    datagrams: true,
    on: (kind) => isUdp(kind) && isSideBySide(kind),
    handler: "secret",
    steps: [
      ["a", "connects"],
      ["a", "sends", "be quiet"],
      ["a", "is past", "finish"],
      ["a", "sends", "hello"],
      ["a", "reads", 1],
      ["a", "is past", "finish", 2],
    ],
    differs: [{
      reason: "no reply is no datagram here; Python's DatagramRequestHandler sends an empty one",
      python: ['a: received [""]'],
      here: ['a: received ["hello"]'],
    }],
  },
  {
    name: "a datagram's handler throws: finish runs, handle_error is told",
    datagrams: true,
    handler: "throws in handle",
    steps: [["a", "connects"], ["a", "sends", "hello"], ["a", "is past", "handle_error"]],
  },
  {
    name: "verify_request says no to a datagram",
    datagrams: true,
    handler: "upper",
    quirk: "verify_request says no",
    steps: [["a", "connects"], ["a", "sends", "hello"], ["a", "is past", "verify_request"]],
  },
  {
    name: "handle_request with a timeout, for datagrams",
    datagrams: true,
    handler: "upper",
    manual: true,
    steps: [
      ["server", "listens"],
      ["server", "does", "handle_request", { timeout: 20 }],
      ["a", "connects"],
      ["a", "sends", "hello"],
      ["server", "does", "handle_request", { timeout: 5_000 }],
      ["a", "reads", 1],
      ["a", "is past", "finish"],
    ],
  },
  {
    name: "shutdown ends serve_forever, for datagrams",
    datagrams: true,
    handler: "upper",
    steps: [
      ["a", "connects"],
      ["a", "sends", "hello"],
      ["a", "reads", 1],
      ["a", "is past", "finish"],
      ["server", "does", "shutdown"],
      ["server", "is past", "serve_forever returned"],
      ["server", "does", "server_close"],
    ],
  },
];
