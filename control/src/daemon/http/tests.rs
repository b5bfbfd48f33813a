use super::*;
use std::net::{Ipv4Addr, Ipv6Addr};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const OTHER: IpAddr = IpAddr::V4(Ipv4Addr::new(127, 0, 0, 9));

#[test]
fn a_wildcard_replaces_the_addresses_that_it_covers() {
    let (any, any_v6) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED));
    let loopback_v6 = IpAddr::V6(Ipv6Addr::LOCALHOST);
    assert_eq!(without_covered(&[LOOPBACK, OTHER, LOOPBACK]), [LOOPBACK, OTHER]);
    assert_eq!(without_covered(&[LOOPBACK, any, OTHER]), [any]);
    assert_eq!(without_covered(&[LOOPBACK, any, loopback_v6]), [any, loopback_v6]);
    assert_eq!(without_covered(&[LOOPBACK, any, any_v6, loopback_v6]), [any_v6]);
}

#[tokio::test]
async fn a_port_in_use_on_one_address_is_released_on_all() {
    let journal = Journal::unkept();
    let mut live = journal.listen();
    let taken = TcpListener::bind((OTHER, 0)).await.unwrap();
    let preferred = taken.local_addr().unwrap().port();
    let bound = Bound::listen(preferred, None, &[LOOPBACK, OTHER], &journal).await.unwrap();
    let port = bound.port().get();
    assert_ne!(port, preferred);
    assert_eq!(bound.listeners.len(), 2);
    for listener in bound.listeners.values() {
        assert_eq!(listener.local_addr().unwrap().port(), port);
    }
    let line: serde_json::Value = serde_json::from_str(&live.try_recv().unwrap()).unwrap();
    assert_eq!(line["kind"], "daemon-http-port-fallback");
    assert_eq!((&line["preferred"], &line["actual"]), (&preferred.into(), &port.into()));
}

#[tokio::test]
async fn a_free_port_is_used_and_reported_for_each_address() {
    let journal = Journal::unkept();
    let free = Bound::listen(0, None, &[LOOPBACK], &journal).await.unwrap().port().get();
    let mut live = journal.listen();
    let bound = Bound::listen(free, None, &[LOOPBACK, OTHER], &journal).await.unwrap();
    assert_eq!(bound.port().get(), free);
    for host in ["127.0.0.1", "127.0.0.9"] {
        let line: serde_json::Value = serde_json::from_str(&live.try_recv().unwrap()).unwrap();
        assert_eq!((&line["kind"], &line["host"]), (&"daemon-http-listening".into(), &host.into()));
    }
}

#[tokio::test]
async fn the_port_of_the_previous_daemon_precedes_ephemeral_ports() {
    let journal = Journal::unkept();
    let taken = TcpListener::bind((LOOPBACK, 0)).await.unwrap();
    let preferred = taken.local_addr().unwrap().port();
    let last = Bound::listen(0, None, &[LOOPBACK], &journal).await.unwrap().port();
    let again = Bound::listen(preferred, Some(last), &[LOOPBACK], &journal).await.unwrap();
    assert_eq!(again.port(), last);
    let third = Bound::listen(preferred, Some(last), &[LOOPBACK], &journal).await.unwrap();
    assert_ne!(third.port(), last, "that port is in use, too");
    drop(taken);
    assert_eq!(
        Bound::listen(preferred, Some(last), &[LOOPBACK], &journal).await.unwrap().port().get(),
        preferred
    );
}

#[tokio::test]
async fn an_address_of_another_host_is_named_in_the_error() {
    let foreign = "192.0.2.1".parse().unwrap();
    let error = Bound::listen(0, None, &[LOOPBACK, foreign], &Journal::unkept()).await.unwrap_err();
    assert!(error.to_string().starts_with("cannot listen on 192.0.2.1:"), "{error}");
}
