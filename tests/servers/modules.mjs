// Loads N modules of a dev server at once, each over its own connection, and checks that each answer is the requested one.
//
// node modules.mjs PORT N
import assert from 'node:assert/strict';
import http from 'node:http';

const [port, count] = process.argv.slice(2).map(Number);
const agent = new http.Agent({ keepAlive: false, maxSockets: Infinity });

function load(number) {
  return new Promise((resolve, reject) => {
    const request = http.get({ host: 'localhost', port, path: `/src/m/${number}.js`, agent }, (response) => {
      let text = '';
      response.setEncoding('utf8');
      response.on('data', (piece) => { text += piece; });
      response.on('error', reject);
      response.on('end', () => resolve({ status: response.statusCode, text }));
    });
    request.setTimeout(60_000, () => request.destroy(new Error(`module ${number}: nothing came for 60 s`)));
    request.on('error', reject);
  });
}

const numbers = Array.from({ length: count }, (_, number) => number);
const loaded = await Promise.all(numbers.map(load));
loaded.forEach(({ status, text }, number) => {
  assert.equal(status, 200, `module ${number}`);
  assert.ok(text.includes(`module-${number}-`), `module ${number} is another one: ${text.slice(0, 80)}`);
});
