// Proves hot module replacement through a forward: joins Vite's WebSocket as a page does, changes a file on disk, and
// waits for the update and the new module.
//
// node hmr.mjs PORT FILE MODULE        e.g. node hmr.mjs 5173 src/hot.js /src/hot.js
import assert from 'node:assert/strict';
import crypto from 'node:crypto';
import { once } from 'node:events';
import { readFile, writeFile } from 'node:fs/promises';
import http from 'node:http';

const [port, file, module] = process.argv.slice(2);

async function fetched(path) {
  const response = await fetch(`http://localhost:${port}${path}`);
  assert.equal(response.status, 200, path);
  return response.text();
}

/** The text messages of a WebSocket (RFC 6455, 5.2), as far as a server sends them: unmasked and in one piece. */
function messages(socket, head, hear) {
  let held = head;
  const parse = () => {
    for (;;) {
      if (held.length < 2) return;
      let [start, length] = [2, held[1] & 0x7f];
      if (length === 126) {
        if (held.length < 4) return;
        [start, length] = [4, held.readUInt16BE(2)];
      } else if (length === 127) {
        if (held.length < 10) return;
        [start, length] = [10, Number(held.readBigUInt64BE(2))];
      }
      if (held.length < start + length) return;
      const opcode = held[0] & 0x0f;
      const payload = held.subarray(start, start + length);
      held = held.subarray(start + length);
      if (opcode === 1) hear(JSON.parse(payload.toString()));
    }
  };
  socket.on('data', (piece) => {
    held = Buffer.concat([held, piece]);
    parse();
  });
  parse();
}

async function join(token) {
  const key = crypto.randomBytes(16).toString('base64');
  const request = http.request({
    host: 'localhost',
    port,
    path: `/?token=${token}`,
    headers: {
      connection: 'Upgrade',
      upgrade: 'websocket',
      origin: `http://localhost:${port}`,
      'sec-websocket-key': key,
      'sec-websocket-version': '13',
      'sec-websocket-protocol': 'vite-hmr',
    },
  });
  request.end();
  const answered = once(request, 'upgrade');
  const refused = once(request, 'response').then(([response]) => assert.fail(`refused: ${response.statusCode}`));
  const [response, socket, head] = await Promise.race([answered, refused]);
  const accept = crypto.createHash('sha1').update(`${key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11`).digest('base64');
  assert.equal(response.headers['sec-websocket-accept'], accept);
  return [socket, head];
}

/** Resolves with the first message that `wanted` holds for. */
function waiter() {
  const heard = [];
  const waiting = [];
  const hear = (message) => {
    heard.push(message);
    for (const { wanted, resolve } of waiting) if (wanted(message)) resolve(message);
  };
  const until = (wanted) => {
    const found = heard.find(wanted);
    return found ?? new Promise((resolve) => { waiting.push({ wanted, resolve }); });
  };
  return { hear, until, heard };
}

const { hear, until, heard } = waiter();
const guard = setTimeout(() => {
  console.error(`no update arrived within 20 s; received ${JSON.stringify(heard)}`);
  process.exit(1);
}, 20_000);
const client = await fetched('/@vite/client');
const [, token] = client.match(/wsToken\s*=\s*"([^"]+)"/) ?? assert.fail('no token in /@vite/client');
const [socket, head] = await join(token);
messages(socket, head, hear);
await until((message) => message.type === 'connected');
// Vite reports changes of modules that a client has loaded.
await fetched('/src/main.js');
await fetched(module);

const marker = `changed-${crypto.randomBytes(6).toString('hex')}`;
await writeFile(file, (await readFile(file, 'utf8')).replace(/'[^']*'/, `'${marker}'`));
const concerns = (message) => (message.updates ?? []).find((update) => update.path === module);
const update = concerns(await until((message) => message.type === 'update' && concerns(message)));
const changed = await fetched(`${update.acceptedPath}?t=${update.timestamp}`);
assert.ok(changed.includes(marker), 'the module that the update names is the new one');
socket.destroy();
clearTimeout(guard);
