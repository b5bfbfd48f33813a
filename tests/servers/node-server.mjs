// A typical Node server: it listens on `localhost`, which may be ::1 only, and supports the features of dev servers:
// streams, uploads, keep-alive, server-sent events, a protocol upgrade. It exits with code 42 on SIGTERM.
//
// node node-server.mjs PORT
import crypto from 'node:crypto';
import http from 'node:http';

const port = Number(process.argv[2]);
const BLOCK = crypto.randomBytes(1 << 20);
const listeners = new Set();

/** Streams `bytes` bytes and tells their SHA-256 in a trailer, as nothing else is known to the end. */
function stream(response, bytes) {
  response.writeHead(200, { 'content-type': 'application/octet-stream', trailer: 'x-sha256' });
  const hash = crypto.createHash('sha256');
  let left = bytes;
  const more = () => {
    while (left > 0) {
      // Pieces of many sizes, so that their boundaries are irregular.
      const piece = BLOCK.subarray(0, Math.min(left, 1 + crypto.randomInt(200_000)));
      left -= piece.length;
      hash.update(piece);
      if (!response.write(piece)) return response.once('drain', more);
    }
    response.addTrailers({ 'x-sha256': hash.digest('hex') });
    response.end();
  };
  more();
}

function receive(request, response) {
  const hash = crypto.createHash('sha256');
  request.on('data', (piece) => hash.update(piece));
  request.on('end', () => response.end(`${hash.digest('hex')}\n`));
}

function events(request, response) {
  response.writeHead(200, { 'content-type': 'text/event-stream', 'cache-control': 'no-cache' });
  response.write('data: welcome\n\n');
  listeners.add(response);
  request.on('close', () => listeners.delete(response));
}

const server = http.createServer((request, response) => {
  const url = new URL(request.url, 'http://localhost');
  if (url.pathname === '/stream') return stream(response, Number(url.searchParams.get('bytes')));
  if (url.pathname === '/hash') return receive(request, response);
  if (url.pathname === '/events') return events(request, response);
  if (url.pathname === '/emit') {
    for (const listener of listeners) listener.write(`data: ${url.searchParams.get('text')}\n\n`);
    return response.end(`${listeners.size}\n`);
  }
  // The connection of a request shows whether the client reused it.
  response.setHeader('x-connection', `${request.socket.remoteAddress} ${request.socket.remotePort}`);
  return response.end('hello from node\n');
});

server.on('upgrade', (request, socket, head) => {
  socket.write('HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n');
  if (head.length > 0) socket.write(head);
  socket.on('error', () => socket.destroy());
  socket.pipe(socket);
});

process.on('SIGTERM', () => {
  console.log('got SIGTERM');
  process.exit(42);
});

server.listen(port, 'localhost', () => {
  console.log(`pid ${process.pid}`);
  console.log(`listening on ${server.address().address}`);
});
