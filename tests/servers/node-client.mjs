// The client of node-server.mjs. The second argument names the check; the exit code is 0 if it succeeds.
//
// node node-client.mjs PORT keepalive|stream|upgrade|events
import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import { once } from 'node:events';
import http from 'node:http';

const port = Number(process.argv[2]);
const sha256 = (bytes) => crypto.createHash('sha256').update(bytes).digest('hex');

/** A response whose body has not been read. */
async function open(path, options = {}) {
  const request = http.request({ host: 'localhost', port, path, ...options });
  request.end();
  const [response] = await once(request, 'response');
  return response;
}

async function read(response) {
  const pieces = [];
  for await (const piece of response) pieces.push(piece);
  return Buffer.concat(pieces);
}

async function keepalive() {
  const agent = new http.Agent({ keepAlive: true, maxSockets: 1 });
  const connections = new Set();
  for (let request = 0; request < 200; request += 1) {
    const response = await open('/', { agent });
    connections.add(response.headers['x-connection']);
    assert.equal((await read(response)).toString(), 'hello from node\n');
  }
  agent.destroy();
  assert.equal(connections.size, 1, 'one connection carries all requests');
}

async function stream() {
  const bytes = 20_000_000;
  const response = await open(`/stream?bytes=${bytes}`);
  const body = await read(response);
  assert.equal(body.length, bytes);
  assert.equal(sha256(body), response.trailers['x-sha256'], 'the hash that the server sent after the body');
}

/** Sends while it receives, ends its own side first, and gets everything back before the other side ends. */
async function upgrade() {
  const request = http.request({ host: 'localhost', port, headers: { connection: 'Upgrade', upgrade: 'echo' } });
  request.end();
  const [response, socket, head] = await once(request, 'upgrade');
  assert.equal(response.statusCode, 101);
  const sent = crypto.randomBytes(4_000_000);
  const echoed = read(socket);
  socket.unshift(head);
  for (let at = 0; at < sent.length;) {
    const end = at + 1 + crypto.randomInt(90_000);
    if (!socket.write(sent.subarray(at, end))) await once(socket, 'drain');
    at = end;
  }
  socket.end();
  assert.equal(sha256(await echoed), sha256(sent));
}

/** Five streams of events stay open while others come and go, and each hears what is said at the end. */
async function events() {
  const streams = [];
  for (let at = 0; at < 5; at += 1) streams.push(await open('/events', { agent: false }));
  const heard = streams.map(() => '');
  streams.forEach((events, at) => events.on('data', (piece) => { heard[at] += piece; }));
  const all = (text) => heard.every((events) => events.includes(text));
  const until = async (text) => {
    while (!all(text)) await Promise.race(streams.map((events) => once(events, 'data')));
  };
  await until('data: welcome');
  for (let at = 0; at < 50; at += 1) await read(await open('/', { agent: false }));
  assert.equal((await read(await open('/emit?text=changed'))).toString(), '5\n');
  await until('data: changed');
  streams.forEach((events) => events.destroy());
}

const guard = setTimeout(() => {
  console.error('nothing more came within 30 s');
  process.exit(1);
}, 30_000);
await { keepalive, stream, upgrade, events }[process.argv[3]]();
clearTimeout(guard);
