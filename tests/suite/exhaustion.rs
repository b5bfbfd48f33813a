//! Claims 7 and 8: an exhausted resource on the host or inside degrades service without ending it, and service recovers when
//! the resource is available again.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Command, Stdio};

use landfall_engine::RingChoice;
use landfall_engine::command::{Ending, Event, Reach};
use landfall_tests::case::Case;
use landfall_tests::process::{descriptors, engine_idle_share, limit_descriptors, process_idle_share};
use landfall_tests::{End, Forward, Relay, Server, connect, note, reset, wait_until};

use crate::observe::ends_by;

pub(crate) const CASES: &[Case] = &[
    Case::each_ring("c07_running_out_of_descriptors_degrades", running_out_of_descriptors),
    Case::each_ring("c08_running_out_of_ephemeral_ports_is_contained", running_out_of_ports),
];

/// `_flood ADDRESS`: reads a number from its standard input, makes that many connections, holds them, prints a line, and
/// closes them when its standard input ends.
pub(crate) fn flood(arguments: &[String]) {
    landfall_tests::process::raise_descriptors();
    let address: SocketAddr = arguments[0].parse().unwrap();
    let mut count = [0];
    std::io::stdin().read_exact(&mut count).unwrap();
    let held: Vec<TcpStream> = (0..count[0]).map(|_| connect(address)).collect();
    std::io::stdout().write_all(b"connected").unwrap();
    std::io::stdout().flush().unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    drop(held);
}

/// A process that holds connections, so that its descriptors do not count as ours.
struct Flood(Child);

impl Flood {
    fn prepare(forward: Forward) -> Flood {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["_flood", &forward.v4().to_string()])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        Flood(child)
    }

    /// Makes it connect, and waits until it has.
    fn connect(&mut self, count: u8) {
        self.0.stdin.as_mut().unwrap().write_all(&[count]).unwrap();
        self.0.stdout.as_mut().unwrap().read_exact(&mut [0; 9]).unwrap();
    }

    fn end(mut self) {
        drop(self.0.stdin.take());
        assert!(self.0.wait().unwrap().success());
    }
}

fn running_out_of_descriptors(ring: RingChoice) {
    let mut relay = Relay::start(ring);
    let servers: Vec<_> = [3000, 3001, 3002]
        .map(|port| Server::listen(&relay.inside, &format!("127.0.0.1:{port}")))
        .into_iter()
        .collect();
    let forwards = [3000, 3001, 3002].map(|port| relay.forward(port));
    let echo_once = |forward: Forward, server: &Server| {
        let client = connect(forward.v4());
        drop(server.accept());
        assert_eq!(ends_by(&client), End::Eof);
    };
    for (forward, server) in forwards.into_iter().zip(&servers) {
        echo_once(forward, server);
    }
    relay.driver.pending();
    let mut floods = forwards.map(Flood::prepare);
    // The servers never accept, so they use no descriptors; a connection uses two of the relay's.
    let few = descriptors() + 40;
    limit_descriptors(few);
    floods.iter_mut().for_each(|flood| flood.connect(100));
    relay
        .driver
        .expect("the shortage to be reported", |event| matches!(event, Event::Degraded { .. }).then_some(()));
    let load = process_idle_share("without descriptors");
    let reported = relay.driver.pending();
    assert!(
        !reported.iter().any(|event| matches!(event, Event::Degraded { .. })),
        "reported more than once while it lasted: {reported:?}"
    );
    // A listener whose accepts are paused can be closed like any other.
    relay.driver.close(forwards[2].id, Ending::Reset);
    for flood in floods {
        flood.end();
    }
    // The servers have not accepted, so the relay still holds the connections of the flood, and the shortage continues until
    // the limit is raised.
    limit_descriptors(few + 4000);
    relay.driver.expect("the recovery to be reported", |event| {
        matches!(event, Event::Recovered { .. }).then_some(())
    });
    let forwards = [forwards[0], forwards[1], relay.forward(3002)];
    for ((forward, server), accepted) in forwards.into_iter().zip(&servers).zip([101, 101, 0]) {
        // Waiting clients are served, although they have sent their FIN in the meantime.
        relay.stats_become(forward, "the flood to be over", |stats| {
            while server.has_pending_connection() {
                drop(server.accept());
            }
            stats.open == 0 && stats.accepted == accepted
        });
        echo_once(forward, server);
    }
    note!("{:.1} % of a processor while descriptors were short", load * 100.0);
}

fn running_out_of_ports(ring: RingChoice) {
    const PORTS: usize = 10;
    let mut relay = Relay::start(ring);
    relay.inside.set_sysctl("ipv4/ip_local_port_range", "40000 40009");
    let server = Server::listen(&relay.inside, "127.0.0.1:3000");
    let forward = relay.forward_reach(3000, Reach { v4: true, v6: false });
    for round in 1..=3 {
        let clients: Vec<TcpStream> = (0..3 * PORTS).map(|_| connect(forward.v4())).collect();
        let over = relay.stats_become(forward, "those without a port to be reset", |stats| {
            stats.exhausted == round * 2 * PORTS as u64
        });
        assert_eq!(over.open, PORTS as u64, "{over:?}");
        engine_idle_share("without ports");
        let held: Vec<TcpStream> = (0..PORTS).map(|_| server.accept()).collect();
        let mut living = Vec::new();
        for client in clients {
            client.set_nonblocking(true).unwrap();
            match client.peek(&mut [0]) {
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => living.push(client),
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
                other => panic!("neither alive nor reset: {other:?}"),
            }
        }
        assert_eq!(living.len(), PORTS);
        // With a reset, so that no port stays in TIME_WAIT.
        living.into_iter().for_each(reset);
        wait_until("all to be over", || {
            let stats = relay.stats(forward);
            if stats.open == 0 { Ok(()) } else { Err(stats) }
        });
        drop(held);
    }
    let client = connect(forward.v4());
    drop(server.accept());
    assert_eq!(ends_by(&client), End::Eof);
}
