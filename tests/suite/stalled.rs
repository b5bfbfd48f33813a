//! Claim 5: stalled readers use a bounded amount of memory, and do not block other connections.

use std::io::Write;

use landfall_engine::RingChoice;
use landfall_engine::limits::Limits;
use landfall_tests::case::Case;
use landfall_tests::process::{engine_idle_share, resident_bytes};
use landfall_tests::{
    Namespace, Pattern, Relay, Server, connect, is_long, note, read_exactly, reset, wait_until,
};

pub(crate) const CASES: &[Case] = &[Case::each_ring(
    "c05_stalled_readers_use_bounded_memory_and_block_no_other_connection",
    stalled_readers,
)];

fn stalled_readers(ring: RingChoice) {
    let count = if is_long() { 1000 } else { 200 };
    // The data in the kernel is bounded as well; otherwise the case itself would fail: when TCP's memory runs out, the
    // kernel resets connections that were closed before their data was sent (tcp_mem, tcp_check_oom() in net/ipv4/tcp.c),
    // and a thousand full connections take gigabytes by default.
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

    // More than the buffers of one direction hold.
    let pattern = Pattern::new(1).bytes(8 << 20);
    let before = resident_bytes();
    let mut stalled = Vec::new();
    for _ in 0..count {
        let client = connect(source.v4());
        let server = sources.accept();
        server.set_nonblocking(true).unwrap();
        stalled.push((client, server, 0));
    }
    // Every buffer is full when no server could send a byte for a while.
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
    // A buffer for each stalled direction, and the tables.
    let bound = count * Limits::default().buffer_bytes + 4 * 1024 * 1024;
    assert!(grown < bound, "{count} stalled readers: {grown} bytes, over {bound}");
    engine_idle_share("waiting for stalled readers");

    // Other connections continue unaffected.
    std::thread::scope(|scope| {
        for seed in 0..50 {
            scope.spawn(move || round_trips(echo, seed));
        }
    });

    // The stalled readers that read now get every byte; the others close.
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

/// Limits the buffers of later sockets in `namespace` to 128 KiB each.
fn kernel_holds_little(namespace: &Namespace) {
    namespace.set_sysctl("ipv4/tcp_rmem", "4096 65536 131072");
    namespace.set_sysctl("ipv4/tcp_wmem", "4096 65536 131072");
}

/// Exchanges a hundred messages in both directions.
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
