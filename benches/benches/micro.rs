//! The pure parts of landfall, each by itself: what a scan, a relayed message and a command cost before the kernel is
//! asked for anything. `cargo bench -p landfall-benches`.

use std::fmt::Write;
use std::hint::black_box;
use std::num::NonZeroU16;
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use landfall_engine::channel::Channel;
use landfall_engine::command::{Command, ForwardId, Listening, Reach, UpstreamId};
use landfall_engine::limits::Limits;
use landfall_engine::relay::{Action, Connection, Direction, Input, ReadEnd};
use landfall_engine::watch::reading::Reading;
use landfall_engine::watch::{diff, parse};

/// Rows of `/proc/net/tcp`: a quarter listens on 127.0.0.1, the others are established.
fn table(rows: u16) -> String {
    let mut text = String::from(
        "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n",
    );
    for row in 0..rows {
        let (state, remote) = if row % 4 == 0 { ("0A", "00000000:0000") } else { ("01", "0100007F:D431") };
        let port = row + 1024;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "{row:4}: 0100007F:{port:04X} {remote} {state} 00000000:00000000 00:00000000 00000000  1000        0 \
             {} 1 0000000000000000 100 0 0 10 0",
            24_000 + u32::from(row)
        );
    }
    text
}

fn parsing(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    for rows in [10, 1_000, 10_000] {
        let text = table(rows);
        assert_eq!(parse::rows(text.as_bytes()).count(), usize::from(rows).div_ceil(4));
        group.throughput(Throughput::Elements(rows.into()));
        group.bench_function(format!("{rows} rows"), |bencher| {
            bencher.iter(|| parse::rows(black_box(text.as_bytes())).count());
        });
        group.bench_function(format!("{rows} rows into a reading"), |bencher| {
            bencher.iter(|| parse::listeners(black_box(text.as_bytes()), b""));
        });
    }
    group.finish();
}

fn reading(ports: std::ops::Range<u16>) -> Reading {
    let row = |port| {
        let port = NonZeroU16::new(port).unwrap_or(NonZeroU16::MIN);
        Listening { port, address: [127, 0, 0, 1].into(), inode: port.get().into(), uid: 1000 }
    };
    ports.map(row).collect()
}

fn differences(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("diff");
    for rows in [10, 1_000, 10_000] {
        let (older, newer) = (reading(1024..1024 + rows), reading(1025..1025 + rows));
        assert_eq!(diff::between(&older, &newer).opened.len(), 1);
        group.throughput(Throughput::Elements(rows.into()));
        group.bench_function(format!("{rows} rows, none changed"), |bencher| {
            bencher.iter(|| diff::between(black_box(&older), black_box(&older)));
        });
        group.bench_function(format!("{rows} rows, one opened and one closed"), |bencher| {
            bencher.iter(|| diff::between(black_box(&older), black_box(&newer)));
        });
    }
    group.finish();
}

/// One message whose write is blocked for a while, and a whole connection with its two FINs. A message that is written at once
/// steps no machine.
fn relaying(criterion: &mut Criterion) {
    let (limits, now) = (Limits::default(), Instant::now());
    let blocked = Input::Blocked(Direction::Up);
    let mut group = criterion.benchmark_group("relay");
    group.bench_function("a blocked message", |bencher| {
        let (mut connection, mut actions) = (Connection::new(), Vec::with_capacity(8));
        connection.on(Input::Start, now, &limits, &mut actions);
        bencher.iter(|| {
            actions.clear();
            connection.on(black_box(blocked), now, &limits, &mut actions);
            connection.on(black_box(Input::Wrote(Direction::Up)), now, &limits, &mut actions);
            actions.len()
        });
        assert!(matches!(actions[..], [Action::Read(Direction::Up)]));
    });
    group.bench_function("a connection with one message each way", |bencher| {
        let mut actions = Vec::with_capacity(16);
        bencher.iter(|| {
            actions.clear();
            let mut connection = Connection::new();
            connection.on(Input::Start, now, &limits, &mut actions);
            for direction in Direction::ALL {
                connection.moved(black_box(direction), 64, false, &limits);
            }
            for direction in Direction::ALL {
                connection.on(black_box(Input::Read(direction, ReadEnd::Eof)), now, &limits, &mut actions);
            }
            assert!(connection.is_finished());
            actions.len()
        });
    });
    group.finish();
}

fn commands(criterion: &mut Criterion) {
    let port = NonZeroU16::new(3000).unwrap_or(NonZeroU16::MIN);
    let command = Command::OpenListener {
        forward: ForwardId(7),
        upstream: UpstreamId(3),
        host_port: port,
        target_port: port,
        reach: Reach { v4: true, v6: false },
    };
    let text = serde_json::to_vec(&command).expect("a command is plain data");
    let mut group = criterion.benchmark_group("command");
    group.bench_function("encode", |bencher| bencher.iter(|| serde_json::to_vec(black_box(&command))));
    group.bench_function("decode", |bencher| {
        bencher
            .iter(|| serde_json::from_slice::<Command>(black_box(&text)).is_ok_and(|told| told == command));
    });
    group.bench_function("through a channel", |bencher| {
        let (driver, engine) = Channel::pair().expect("a socket pair");
        bencher.iter(|| {
            driver.send(black_box(&command), &[]).expect("room for one message");
            let received = engine.recv::<Command>().expect("the message that was sent");
            assert!(received.is_some_and(|(told, _)| told == command));
        });
    });
    group.finish();
}

criterion_group! {
    name = micro;
    // Short, since the functions are: the whole takes a minute and a half.
    config = Criterion::default().warm_up_time(Duration::from_secs(1)).measurement_time(Duration::from_secs(3));
    targets = parsing, differences, relaying, commands
}
criterion_main!(micro);
