//! Claim 10: an empty buffer pool causes neither a deadlock nor a busy loop.

use std::io::Write;

use landfall_engine::RingChoice;
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::process::engine_idle_share;
use landfall_tests::{End, Pattern, Relay, Server, connect, finish, read_to_end, send_all};

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c10_two_buffers_serve_five_hundred_connections", |ring| {
        five_hundred(
            ring,
            Limits { buffers_max: 2, buffers_kept: 1, pipes_max: 0, pipes_kept: 0, ..Limits::default() },
        );
    }),
    Case::each_ring("c10_two_buffers_and_two_pipes_serve_five_hundred_connections", |ring| {
        five_hundred(
            ring,
            Limits { buffers_max: 2, buffers_kept: 2, pipes_max: 2, pipes_kept: 0, ..Limits::default() },
        );
    }),
];

fn five_hundred(ring: RingChoice, limits: Limits) {
    const COUNT: u64 = 500;
    let mut relay = Relay::start_with(limits, ring);
    Server::listen(&relay.inside, "127.0.0.1:3000").serve(|mut stream| {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(bytes @ 1..) = landfall_tests::read_some(&stream, &mut buffer) {
            if stream.write_all(&buffer[..bytes]).is_err() {
                return;
            }
        }
    });
    let forward = relay.forward(3000);
    let clients: Vec<_> = (0..COUNT).map(|_| connect(forward.v4())).collect();
    engine_idle_share("idle connections");
    std::thread::scope(|scope| {
        for (seed, client) in (0..).zip(&clients) {
            // One in ten is a bulk stream, the others send few bytes.
            let length = if seed % 10 == 0 { 2_000_000 } else { 30_000 };
            let pattern = Pattern::new(seed);
            scope.spawn(move || {
                send_all(client, pattern, length);
                finish(client);
            });
            scope.spawn(move || {
                let mut checker = pattern.checker();
                assert_eq!(read_to_end(client, &mut checker), End::Eof);
                assert_eq!(checker.position(), length, "connection {seed}");
            });
        }
    });
    let stats = relay.stats_become(forward, "all to be over", |stats| stats.open == 0);
    assert_eq!(stats.completed, COUNT, "{stats:?}");
}
