/**
 * Scenarios of what a handler reads and writes.
 *
 * @module
 */

import { CLOSED, isTcp, MEGABYTE, type Scenario, SERVED, type Step } from "./scenario.ts";

export const STREAMS: Scenario[] = [
  // Streams
  {
    name: "a client is echoed until it half-closes",
    handler: "echo",
    steps: [
      ["a", "connects"],
      ["a", "sends", "hello"],
      ["a", "reads", 5],
      ["a", "sends", "world"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "three clients come one after the other",
    handler: "raw lines",
    ordered: true,
    steps: ["a", "b", "c"].flatMap((client): Step[] => [
      [client, "connects"],
      [client, "sends", "hello world\n"],
      [client, "half-closes"],
      [client, "reads to the end"],
      [client, "is past", "close_request"],
    ]),
  },
  {
    name: "a client that says nothing and leaves is served",
    handler: "echo",
    steps: [["a", "connects"], ["a", "closes"], ["a", "is past", "close_request"]],
  },
  {
    name: "a megabyte and its end",
    handler: "count to the end",
    steps: [["a", "connects"], ["a", "sends", MEGABYTE], ["a", "half-closes"], ["a", "reads to the end"]],
  },
  {
    name: "four megabytes in one write arrive whole",
    handler: "big",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "lines, with and without a carriage return, and a last one without an end",
    handler: "upper lines",
    steps: [
      ["a", "connects"],
      ["a", "sends", "one\ntwo\r\n\nthree"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "lines that come in pieces",
    handler: "upper lines",
    steps: [
      ["a", "connects"],
      ["a", "sends", "one\ntw"],
      ["a", "reads", 4],
      ["a", "sends", "o\nthree\n"],
      ["a", "half-closes"],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "lines that are no UTF-8",
    handler: "upper lines",
    steps: [["a", "connects"], ["a", "sends", Uint8Array.of(0x61, 0xff, 0x0a)], ["a", "half-closes"], [
      "a",
      "reads to the end",
    ]],
    differs: [{
      reason: "a line is text here; readUntil() gives its bytes",
      python: ['a: received "Aÿ\\n", then the end'],
      here: ['a: received "Aï¿½\\n", then the end'],
    }],
  },
  {
    name: "lines as bytes keep their ends",
    handler: "raw lines",
    steps: [["a", "connects"], ["a", "sends", Uint8Array.of(0x61, 0xff, 0x0d, 0x0a)], ["a", "half-closes"], [
      "a",
      "reads to the end",
    ]],
  },
  {
    name: "a last record without its delimiter",
    handler: "raw lines",
    steps: [["a", "connects"], ["a", "sends", "one\ntwo"], ["a", "half-closes"], ["a", "reads to the end"]],
    differs: [{
      reason:
        "readUntil() never hands out part of a record as a whole one; readLine() takes an unended last line, as readline() does",
      python: [`a: ${SERVED} ${CLOSED}`, 'a: received "one\\ntwo", then the end'],
      here: [`a: ${SERVED} handle_error(IncompleteReadError) ${CLOSED}`, 'a: received "one\\n", then the end'],
    }],
  },
  {
    name: "a line of a megabyte",
    on: isTcp,
    handler: "raw lines",
    steps: [["a", "connects"], ["a", "sends", MEGABYTE], ["a", "sends", "\n"], ["a", "half-closes"], [
      "a",
      "reads to the end",
    ]],
    differs: [
      {
        reason: "a line has at most `limit` bytes here, so that no client can fill the memory",
        python: [`a: ${SERVED} ${CLOSED}`, 'a: received "(1048576 x)\\n", then the end'],
        here: [`a: ${SERVED} handle_error(LimitOverrunError) ${CLOSED}`, 'a: received "", then the end'],
      },
    ],
  },
  {
    name: "records of four bytes, and an end inside of one",
    handler: "four bytes",
    steps: [["a", "connects"], ["a", "sends", "abcdefghij"], ["a", "half-closes"], ["a", "reads to the end"]],
    differs: [{
      reason: "readExactly() gives what was asked for or says what is missing; rfile.read() gives less at the end",
      python: [`a: ${SERVED} ${CLOSED}`, 'a: received "abcd\\nefgh\\nij\\n", then the end'],
      here: [`a: ${SERVED} handle_error(IncompleteReadError) ${CLOSED}`, 'a: received "abcd\\nefgh\\n", then the end'],
    }],
  },
  {
    name: "reading on after the end reads the end again",
    handler: "reads past the end",
    steps: [["a", "connects"], ["a", "sends", "hello"], ["a", "half-closes"], ["a", "reads to the end"]],
  },
  {
    name: "what is written leaves without a flush when the handler waits for the answer",
    handler: "ask twice",
    steps: [
      ["a", "connects"],
      ["a", "reads", 11],
      ["a", "sends", "Ada\n"],
      ["a", "reads to the end"],
    ],
  },
  {
    name: "what is still buffered when the handler returns is sent",
    handler: "greet buffered",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "every type that can be written",
    handler: "every type",
    steps: [["a", "connects"], ["a", "reads to the end"]],
    differs: [{
      reason:
        "text is sent as UTF-8 here, and of numbers only bytes are sent, as the order of larger ones is the machine's",
      python: [
        'a: received "bytes: ab\\nbytearray: ab\\nslice: ab\\nempty: read-only: ab\\ntext: TypeError\\n16-bit numbers: abc\\nnumber: TypeError\\n", then the end',
      ],
      here: [
        'a: received "bytes: ab\\nbytearray: ab\\nslice: ab\\nempty: read-only: ab\\ntext: ab\\n16-bit numbers: TypeError\\nnumber: TypeError\\n", then the end',
      ],
    }],
  },
  {
    name: "the handler knows its client's address",
    handler: "tells address",
    steps: [["a", "connects"], ["a", "sends", "ADDRESS\n"], ["a", "reads to the end"]],
  },
  {
    name: "a read that waits too long",
    handler: "impatient",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "a handler that closes its own stream",
    handler: "closes itself",
    steps: [["a", "connects"], ["a", "reads to the end"]],
  },
  {
    name: "a handler that is done before its client has said all",
    handler: "greet and go",
    manual: true,
    steps: [
      ["server", "listens"],
      ["a", "connects"],
      ["a", "sends", "nobody reads this"],
      ["server", "does", "handle_request"],
      ["a", "is past", "close_request"],
      ["a", "reads to the end"],
    ],
  },
];
