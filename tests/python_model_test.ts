/**
 * Python's `socketserver` against mod.ts: each scenario runs against a program on
 * each (python/model_server.py, model_server.ts), and what the clients saw and
 * which hooks ran, in which order, has to be the same. Where the two differ on
 * purpose, the scenario says how and why.
 *
 * @module
 */

import { assert, assertEquals } from "../deps.ts";
import { freePort, Peer, Program, programTestIn, startPython } from "./programs.ts";
import { programTest } from "./testing.ts";

// --- Kinds of servers

/** A server of Python's and ours. */
interface Kind {
  readonly python: string;
  readonly here: string;
  readonly transport: "tcp" | "unix" | "udp" | "unixpacket";
  /** Whether it serves one client after the other. */
  readonly oneByOne: boolean;
}

const KINDS: Kind[] = [
  { python: "TCPServer", here: "TcpServer with maxConnections: 1", transport: "tcp", oneByOne: true },
  { python: "ThreadingTCPServer", here: "TcpServer", transport: "tcp", oneByOne: false },
  { python: "UnixStreamServer", here: "UnixServer with maxConnections: 1", transport: "unix", oneByOne: true },
  { python: "ThreadingUnixStreamServer", here: "UnixServer", transport: "unix", oneByOne: false },
  { python: "UDPServer", here: "UdpServer with maxConcurrent: 1", transport: "udp", oneByOne: true },
  { python: "ThreadingUDPServer", here: "UdpServer", transport: "udp", oneByOne: false },
  {
    python: "UnixDatagramServer",
    here: "UnixDatagramServer with maxConcurrent: 1",
    transport: "unixpacket",
    oneByOne: true,
  },
  { python: "ThreadingUnixDatagramServer", here: "UnixDatagramServer", transport: "unixpacket", oneByOne: false },
];

/** Whose server it is. */
type Side = "python" | "here";

const isOneByOne = (kind: Kind) => kind.oneByOne;
const isSideBySide = (kind: Kind) => !kind.oneByOne;
const isDatagram = (kind: Kind) => kind.transport === "udp" || kind.transport === "unixpacket";
const isUdp = (kind: Kind) => kind.transport === "udp";
const isTcp = (kind: Kind) => kind.transport === "tcp";
const inPython = (_kind: Kind, side: Side) => side === "python";
const inPythonOneByOne = (kind: Kind, side: Side) => kind.oneByOne && side === "python";
const whereHandlersAreWaitedFor = (kind: Kind, side: Side) => kind.oneByOne || side === "here";

// --- Scenarios

/** What a server is told to do; it answers with "CALL returned" or "CALL throws WHAT". */
type Call =
  | "serve_forever"
  | "shutdown"
  | "server_close"
  | "handle_request"
  | "with"
  | "aside"
  | "remember descriptors"
  | "compare descriptors"
  | "count handlers"
  | "fail to bind"
  | "start and stop 20";

/** What a client does, or the server is told to. Whoever waits, waits for a bounded time. */
type Step =
  | readonly [client: string, step: "connects" | "half-closes" | "closes" | "reads to the end"]
  /** Closes with bytes unread, which the peer sees as a reset. */
  | readonly [client: string, step: "resets"]
  /** Connects and resets at once, in one program that the test waits for. */
  | readonly [client: string, step: "comes and resets"]
  | readonly [client: string, step: "sends", data: string | Uint8Array]
  | readonly [client: string, step: "reads", count: number]
  | readonly [client: string, step: "is past", hook: string, times?: number]
  | readonly ["server", "listens"]
  /** Begins a call. */
  | readonly ["server", "begins", call: Call, more?: { timeout: number }]
  /** Begins a call and waits for its end. */
  | readonly ["server", "does", call: Call, more?: { timeout: number }]
  /** Tells whether a call that has begun comes to its end; where it is expected to go on, it is watched for a moment only. */
  | readonly ["server", "is asked about", call: Call, goesOn: (kind: Kind, side: Side) => boolean]
  /** Makes a new server at the address of the first. */
  | readonly ["server", "restarts"]
  /** Tells whether a new client is let in. */
  | readonly ["server", "is dialed"];

/** Lines of the transcript that only one side has, and why. */
interface Difference {
  readonly on?: (kind: Kind) => boolean;
  readonly reason: string;
  readonly python: string[];
  readonly here: string[];
}

interface Scenario {
  /** Whether it is for servers of datagrams; else it is for servers of streams. */
  readonly datagrams?: boolean;
  readonly name: string;
  readonly on?: (kind: Kind) => boolean;
  /** A handler of both model programs. */
  readonly handler: string;
  /** What their servers' own hooks do. */
  readonly quirk?: string;
  /** Whether the steps start the server; else it serves already. */
  readonly manual?: boolean;
  /** Whether the order of hooks is compared over all clients too. */
  readonly ordered?: boolean;
  readonly steps: Step[];
  readonly differs?: Difference[];
}

const MEGABYTE = new Uint8Array(1_048_576).fill("x".charCodeAt(0));

/** The hooks of a connection that is served, up to the end of its handler. */
const SERVED = "get_request verify_request process_request finish_request setup handle finish";

/** And those after it. Both are closeRequest() here. */
const CLOSED = "shutdown_request close_request";

const SCENARIOS: Scenario[] = [
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
        "Python's handler runs in the very loop that shutdown() waits for, a deadlock; here it may be called from anywhere",
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

// --- The harness

/** Long enough for a busy machine; no step that succeeds waits for it. */
const PATIENCE_MS = 10_000;

/** How long a call that is expected to go on is watched. */
const LOOK_MS = 100;

/** Resolves like `promise`, or to `undefined` after `ms`. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  const { promise: late, resolve } = Promise.withResolvers<undefined>();
  const timer = setTimeout(() => resolve(undefined), ms);
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** A line that a model program prints. */
interface ModelEvent {
  readonly server: number;
  /** From 1 on in the order of acceptance; 0 for what concerns the server. */
  readonly connection: number;
  readonly event: string;
  readonly detail?: string;
  /** A port: the server's for "listening", the client's for "get_request"; 0 without ports. */
  readonly peer?: number;
}

function isModelEvent(value: unknown): value is ModelEvent {
  return typeof value === "object" && value !== null && "server" in value && "connection" in value && "event" in value;
}

/** A model program: many servers, each with a number. */
class Model {
  readonly #program: Program;
  readonly #parsed: ModelEvent[] = [];
  #parsedLength = 0;

  constructor(program: Program) {
    this.#program = program;
  }

  async tell(server: number, call: string, more: Record<string, string | number>): Promise<void> {
    await this.#program.write(JSON.stringify({ server, call, ...more }) + "\n");
  }

  events(server: number): ModelEvent[] {
    this.#parse(this.#program.stdout);
    return this.#parsed.filter((event) => event.server === server);
  }

  /** Waits until an event of the server fits. */
  async has(server: number, what: string, fits: (event: ModelEvent) => boolean): Promise<void> {
    await this.#program.shows(`${what} of server ${server}`, (text) => {
      this.#parse(text);
      return this.#parsed.some((event) => event.server === server && fits(event));
    });
  }

  #parse(text: string): void {
    const end = text.lastIndexOf("\n") + 1;
    for (const line of text.slice(this.#parsedLength, end).split("\n")) {
      if (line === "") continue;
      const event: unknown = JSON.parse(line);
      assert(isModelEvent(event), `Not an event: ${line}`);
      this.#parsed.push(event);
    }
    this.#parsedLength = end;
  }
}

/** A client, and what it saw. Another kind of socket takes another class, and a line in `Play`. */
interface Client {
  /** 0 without ports. */
  readonly port: number;
  /** What it saw, in words. */
  readonly story: string;
  send(data: string | Uint8Array): Promise<void>;
  /** Reads `count` bytes, or to the end. */
  read(count: number): Promise<void>;
  closeWrite(): Promise<void>;
  close(): void;
}

class StreamClient implements Client {
  readonly #conn: Deno.Conn | undefined;
  /** One letter for each byte. */
  readonly #decoder = new TextDecoder("latin1");
  readonly port: number;
  #received = "";
  #count = 0;
  #end = "";
  #isClosed = false;

  constructor(conn: Deno.Conn | undefined, port = 0) {
    this.#conn = conn;
    this.port = conn?.localAddr.transport === "tcp" ? conn.localAddr.port : port;
  }

  get story(): string {
    const received = this.#received.replaceAll(/x{100,}/g, (run) => `(${run.length} x)`);
    return `received ${JSON.stringify(received)}${this.#end && `, then ${this.#end}`}`;
  }

  async send(data: string | Uint8Array): Promise<void> {
    const address = this.#conn?.localAddr;
    const text = address?.transport === "tcp" ? `${address.hostname}:${address.port}` : "";
    const bytes = typeof data === "string" ? new TextEncoder().encode(data.replace("ADDRESS", text)) : data;
    if (!await within(PATIENCE_MS, this.#sendAll(bytes))) {
      throw new Error("The server does not take what a client sends");
    }
  }

  async #sendAll(bytes: Uint8Array): Promise<true> {
    try {
      for (let rest = bytes; rest.length > 0;) rest = rest.subarray(await this.#conn?.write(rest) ?? Infinity);
    } catch (error) {
      if (!isLeaving(error)) throw error;
    }
    return true;
  }

  async read(count: number): Promise<void> {
    if (!await within(PATIENCE_MS, this.#readAll(count))) throw new Error(`A client has waited; it ${this.story}`);
  }

  async #readAll(count: number): Promise<true> {
    for (const goal = this.#count + count; this.#count < goal && this.#end === "";) {
      const into = new Uint8Array(Math.min(goal - this.#count, 65_536));
      try {
        const got = await this.#conn?.read(into) ?? null;
        this.#count += got ?? 0;
        if (got === null) this.#end = "the end";
        this.#received += this.#decoder.decode(into.subarray(0, got ?? 0));
      } catch (error) {
        if (!isLeaving(error)) throw error;
        this.#end = "a reset";
      }
    }
    return true;
  }

  async closeWrite(): Promise<void> {
    try {
      await this.#conn?.closeWrite();
    } catch (error) {
      if (!isLeaving(error)) throw error;
    }
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#conn?.close();
  }
}

/** A client of datagrams: each read is one. */
class DatagramClient implements Client {
  readonly #socket: Deno.DatagramConn;
  readonly #server: Deno.Addr;
  readonly #received: string[] = [];
  #isClosed = false;

  constructor(server: Deno.Addr, localPath = "") {
    this.#server = server;
    this.#socket = localPath === ""
      ? Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 })
      : Deno.listenDatagram({ transport: "unixpacket", path: localPath });
  }

  get port(): number {
    return this.#socket.addr.transport === "udp" ? this.#socket.addr.port : 0;
  }

  get story(): string {
    return `received ${JSON.stringify(this.#received)}`;
  }

  async send(data: string | Uint8Array): Promise<void> {
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
    await this.#socket.send(bytes, this.#server);
  }

  async read(): Promise<void> {
    const received = await within(PATIENCE_MS, this.#socket.receive(new Uint8Array(65_536)));
    if (received === undefined) throw new Error(`A client has waited; it ${this.story}`);
    this.#received.push(new TextDecoder("latin1").decode(received[0]));
  }

  closeWrite(): Promise<void> {
    return Promise.reject(new TypeError("A socket of datagrams has no end"));
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#socket.close();
  }
}

function isLeaving(error: unknown): boolean {
  return error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe ||
    error instanceof Deno.errors.NotConnected || error instanceof Deno.errors.BadResource;
}

/** One run of a scenario against one model. */
class Play {
  readonly #model: Model;
  readonly #kind: Kind;
  readonly #side: Side;
  readonly #number: number;
  readonly #path: string;
  readonly #scenario: Scenario;
  readonly #clients = new Map<string, Client>();
  readonly #lines: string[] = [];
  #port = 0;

  constructor(model: Model, kind: Kind, side: Side, number: number, path: string, scenario: Scenario) {
    this.#model = model;
    this.#kind = kind;
    this.#side = side;
    this.#number = number;
    this.#path = kind.transport.startsWith("unix") ? path : "";
    this.#scenario = scenario;
  }

  /** Runs the steps, and returns what happened: one line for each client, its hooks, and each event of the server. */
  async run(): Promise<string[]> {
    try {
      await this.#do("construct");
      if (!this.#scenario.manual) {
        await this.#listen();
        await this.#tell("serve_forever");
      }
      for (const step of this.#scenario.steps) await this.#step(step);
    } finally {
      for (const client of this.#clients.values()) client.close();
      await this.#tell("drop");
      await this.#model.has(this.#number, "the end", ({ event }) => event === "dropped");
    }
    return [...this.#lines, ...this.#transcript()].sort();
  }

  async #step(step: Step): Promise<void> {
    switch (step[1]) {
      case "listens":
        return await this.#listen();
      case "begins":
        return await this.#tell(step[2], step[3]);
      case "does":
        return await this.#do(step[2], step[3]);
      case "is past":
        return await this.#isPast(step[0], step[2], step[3]);
      case "is asked about":
        return await this.#lookAt(step[2], step[3](this.#kind, this.#side));
      case "restarts":
        await this.#do("construct", { port: this.#port });
        if (!this.#events.at(-1)?.event.startsWith("construct throws")) await this.#listen();
        return;
      case "is dialed":
        return await this.#dial();
      case "connects":
        return void this.#clients.set(step[0], await this.#open(step[0]));
      case "comes and resets": {
        await using program = startPython("model_server.py", ["reset", "127.0.0.1", String(this.#port)]);
        const { stdout } = await program.ended();
        return void this.#clients.set(step[0], new StreamClient(undefined, Number(stdout)));
      }
      case "sends":
        return await this.#client(step[0]).send(step[2]);
      case "reads":
        return await this.#client(step[0]).read(step[2]);
      case "reads to the end":
        return await this.#client(step[0]).read(Infinity);
      case "half-closes":
        return await this.#client(step[0]).closeWrite();
      case "closes":
      case "resets":
        return this.#client(step[0]).close();
    }
  }

  #client(name: string): Client {
    const client = this.#clients.get(name);
    assert(client !== undefined, `The client ${name} has not connected`);
    return client;
  }

  async #open(name: string): Promise<Client> {
    switch (this.#kind.transport) {
      case "udp":
        return new DatagramClient({ transport: "udp", hostname: "127.0.0.1", port: this.#port });
      case "unixpacket":
        return new DatagramClient({ transport: "unixpacket", path: this.#path }, `${this.#path}.${name}`);
      default:
        return new StreamClient(await this.#connect());
    }
  }

  async #connect(): Promise<Deno.Conn> {
    if (this.#path !== "") return await Deno.connect({ transport: "unix", path: this.#path });
    return await Deno.connect({ hostname: "127.0.0.1", port: this.#port });
  }

  async #dial(): Promise<void> {
    try {
      (await this.#connect()).close();
      this.#lines.push("server: lets clients in");
    } catch {
      this.#lines.push("server: lets nobody in");
    }
  }

  async #tell(call: string, more: { timeout?: number; port?: number } = {}): Promise<void> {
    const { handler, quirk = "" } = this.#scenario;
    const port = call === "construct" ? 0 : this.#port;
    const options = { kind: this.#kind.python, path: this.#path, port, handler, quirk, timeout: 0, ...more };
    await this.#model.tell(this.#number, call, options);
  }

  async #do(call: string, more: { timeout?: number; port?: number } = {}): Promise<void> {
    const count = this.#ended(call);
    await this.#tell(call, more);
    await this.#model.has(this.#number, `the end of ${call}`, () => this.#ended(call) > count);
  }

  /** How often a call came to its end. */
  #ended(call: string): number {
    return this.#events.filter(({ event }) => isEndOf(call, event)).length;
  }

  async #listen(): Promise<void> {
    await this.#do("listen");
    this.#port = this.#events.find(({ event }) => event === "listening")?.peer ?? 0;
  }

  async #lookAt(call: string, goesOn: boolean): Promise<void> {
    const ended = this.#model.has(this.#number, `the end of ${call}`, ({ event }) => isEndOf(call, event));
    // It is watched on, but not waited for, when it goes on; the steps let it end.
    const hasEnded = await within(goesOn ? LOOK_MS : PATIENCE_MS, ended.then(() => true));
    this.#lines.push(`server: ${call} ${hasEnded ? "is over" : "goes on"}`);
  }

  async #isPast(who: string, hook: string, times = 1): Promise<void> {
    await this.#model.has(this.#number, `${hook} of ${who}`, () => {
      const calls = this.#events.filter((event) => {
        return event.event === hook && (who === "server" || this.#nameOf(event) === who);
      });
      return calls.length >= times;
    });
  }

  get #events(): ModelEvent[] {
    return this.#model.events(this.#number);
  }

  /** Which client an event is about. */
  #nameOf({ connection }: ModelEvent): string {
    if (connection === 0) return "server";
    const names = [...this.#clients.keys()];
    if (this.#path !== "") return names[connection - 1] ?? "nobody";
    const accepted = this.#events.find((event) => event.connection === connection && event.event === "get_request");
    return names.find((name) => this.#clients.get(name)?.port === accepted?.peer) ?? "nobody";
  }

  #transcript(): string[] {
    const calls = this.#events.map((event) => ({ who: this.#nameOf(event), what: describe(event) }));
    const ofClients = calls.filter(({ who }) => who !== "server");
    const order = ofClients.map(({ who, what }) => `${who}.${what}`).join(" ");
    return [
      ...[...this.#clients].map(([name, client]) => `${name}: ${client.story}`),
      ...[...this.#clients.keys()].map((name) => {
        return [`${name}:`, ...ofClients.filter(({ who }) => who === name).map(({ what }) => what)].join(" ");
      }),
      ...calls.filter(({ who, what }) => who === "server" && !PLUMBING.has(what)).map(({ what }) => `server: ${what}`),
      ...(this.#scenario.ordered && this.#kind.oneByOne ? [`order: ${order}`] : []),
    ];
  }
}

/** Events that are there for the harness. */
const PLUMBING = new Set(["construct returned", "listening", "listen returned", "dropped"]);

function isEndOf(call: string, event: string): boolean {
  return event === `${call} returned` || event.startsWith(`${call} throws`);
}

function describe({ event, detail }: ModelEvent): string {
  return detail === undefined ? event : `${event}(${detail})`;
}

/** The lines of `lines` that `others` has not, or not as often. */
function only(lines: string[], others: string[]): string[] {
  const rest = [...others];
  return lines.filter((line) => {
    const at = rest.indexOf(line);
    if (at >= 0) rest.splice(at, 1);
    return at < 0;
  });
}

function startHere(): Program {
  const script = new URL("model_server.ts", import.meta.url).pathname;
  // Nothing less than all permissions lets it count its descriptors.
  return Program.start(Deno.execPath(), ["run", "--allow-all", "--v8-flags=--expose-gc", script]);
}

for (const kind of KINDS) {
  programTest(`Python's ${kind.python} and ${kind.here} do the same`, async (t) => {
    const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
    try {
      await using pythonProgram = startPython("model_server.py");
      await using hereProgram = startHere();
      const [python, here] = [new Model(pythonProgram), new Model(hereProgram)];
      for (const [i, scenario] of SCENARIOS.entries()) {
        if ((scenario.datagrams ?? false) !== isDatagram(kind) || scenario.on?.(kind) === false) continue;
        const differences = scenario.differs?.filter(({ on }) => on?.(kind) ?? true) ?? [];
        const reasons = differences.map(({ reason }) => `; differs: ${reason}`);
        await t.step(scenario.name + reasons.join(""), async () => {
          const plays = [
            new Play(python, kind, "python", i, `${folder}/python${i}.sock`, scenario),
            new Play(here, kind, "here", i, `${folder}/here${i}.sock`, scenario),
          ];
          const [there = [], ours = []] = await Promise.all(plays.map((play) => play.run()));
          const actual = { python: only(there, ours), here: only(ours, there) };
          const expected = {
            python: differences.flatMap((difference) => difference.python).sort(),
            here: differences.flatMap((difference) => difference.here).sort(),
          };
          assertEquals(actual, expected);
        });
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
}

programTestIn("the two programs of the migration guide do the same", async (folder) => {
  const root = new URL("../", import.meta.url);
  const readme = await Deno.readTextFile(new URL("README.md", root));
  const [, guide = ""] = readme.split("## Coming from Python's socketserver");
  const answers = [];
  for (
    const [language, command, args] of [["py", "python3", []], ["ts", Deno.execPath(), ["run", "--allow-net"]]] as const
  ) {
    const [, program = ""] = guide.match(new RegExp(`\`\`\`${language}[^\\n]*\\n([^]*?)\`\`\``)) ?? [];
    const port = freePort();
    const file = `${folder}/server.${language}`;
    await Deno.writeTextFile(file, program.replace("8010", String(port)).replace("./mod.ts", `${root}mod.ts`));
    await using _server = Program.start(command, [...args, file]);
    using client = await dialUntilAnswered(port);
    await client.send("one\r\ntwo\n\nlast");
    await client.closeWrite();
    answers.push(new TextDecoder().decode(await client.receiveAll()));
  }
  assertEquals(answers, ["ONE\nTWO\n\nLAST\n", "ONE\nTWO\n\nLAST\n"]);
});

/** The programs say nothing when they listen. */
async function dialUntilAnswered(port: number): Promise<Peer> {
  for (const deadline = performance.now() + PATIENCE_MS;;) {
    try {
      return await Peer.connect(port);
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionRefused) || performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}
