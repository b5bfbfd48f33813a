//! Claim 5: readers that stall hold a bounded amount of memory, and hold up nobody else.

use std::io::Write;

use landfall_engine::RingChoice;
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::process::{engine_at_rest, resident_bytes};
use landfall_tests::{
    Namespace, Pattern, Relay, Server, connect, is_long, note, read_exactly, reset, wait_until,
};

pub(crate) const CASES: &[Case] =
    &[Case::each_ring("c05_stalled_readers_bound_memory_and_hold_up_nobody", stalled_readers)];

fn stalled_readers(ring: RingChoice) {
    let count = if is_long() { 1000 } else { 200 };
    // What waits in the kernel is bounded as well, or it would be the case that fails: where TCP's memory runs out, the kernel
    // resets what is closed before it was sent (tcp_mem, tcp_check_oom() in net/ipv4/tcp.c), and a thousand ways that are
    // full take gigabytes by default.
    kernel_holds_little(&Namespace::current());
    let mut relay = Relay::start(ring);
    kernel_holds_little(&relay.inside);
    let sources = Server::listen(&relay.inside, "127.0.0.1:3000");
    let source = relay.forward(3000);
    Server::listen(&relay.inside, "127.0.0.1:3001").serve(|mut stream| {
        let mut buffer = [0; 4096];
        while let Ok(bytes @ 1..) = landfall_tests::read_some(&stream, &mut buffer) {
            if stream.write_all(&buffer[..bytes]).is_err() {
                return;
            }
        }
    });
    let echo = relay.forward(3001);
    round_trips(echo, 1);

    // More than the buffers of one way hold.
    let pattern = Pattern::new(1).bytes(8 << 20);
    let before = resident_bytes();
    let mut stalled = Vec::new();
    for _ in 0..count {
        let client = connect(source.v4());
        let server = sources.accept();
        server.set_nonblocking(true).unwrap();
        stalled.push((client, server, 0));
    }
    // Everything is full once no server could send a byte for a while.
    let mut quiet = 0;
    wait_until("every way to be full", || {
        let mut moved = 0;
        for (_, server, sent) in &mut stalled {
            if let Ok(bytes) = server.write(&pattern[*sent..][..64 * 1024]) {
                *sent += bytes;
                moved += bytes;
            }
        }
        quiet = if moved == 0 { quiet + 1 } else { 0 };
        if quiet >= 20 { Ok(()) } else { Err(moved) }
    });
    let grown = resident_bytes().saturating_sub(before);
    // A lease for each that stalls, and what the tables hold.
    let bound = count * Limits::default().buffer_bytes + 4 * 1024 * 1024;
    assert!(grown < bound, "{count} stalled readers: {grown} bytes, over {bound}");
    engine_at_rest("waiting for stalled readers");

    // Others go on as if nothing were.
    std::thread::scope(|scope| {
        for seed in 0..50 {
            scope.spawn(move || round_trips(echo, seed));
        }
    });

    // Those who read after all get every byte; the rest leave.
    for (index, (client, server, sent)) in stalled.into_iter().enumerate() {
        if index % 10 == 0 {
            drop(server);
            read_exactly(&client, &mut Pattern::new(1).checker(), sent as u64);
        } else {
            reset(client);
        }
    }
    relay.stats_become(source, "all to be over", |stats| stats.open == 0);
    note!("{count} stalled readers: {} KiB of memory each", grown / count / 1024);
}

/// At most 128 KiB in each buffer of a socket that is made in `namespace` from now on.
fn kernel_holds_little(namespace: &Namespace) {
    namespace.set_sysctl("ipv4/tcp_rmem", "4096 65536 131072");
    namespace.set_sysctl("ipv4/tcp_wmem", "4096 65536 131072");
}

/// A hundred times there and back.
fn round_trips(echo: landfall_tests::Forward, seed: u64) {
    let stream = connect(echo.v4());
    let mut checker = Pattern::new(seed).checker();
    let mut message = [0; 64];
    for round in 0..100 {
        Pattern::new(seed).fill(round * 64, &mut message);
        (&stream).write_all(&message).unwrap();
        read_exactly(&stream, &mut checker, (round + 1) * 64);
    }
}
