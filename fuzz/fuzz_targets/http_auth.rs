//! The authentication of a request of the HTTP endpoint, from its head and body (wire specification, A.2):
//! - a token is accepted exactly where a simple reading of the header finds one;
//! - an authorised request contains the token of the container that its body names;
//! - a request with an accepted `Host` contains no other host.

#![no_main]

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use hyper::header::{AUTHORIZATION, HOST, HeaderMap, HeaderName, HeaderValue};
use landfall::daemon::http::auth::{Authorized, Presented, is_addressed_to_this_host};
use landfall::daemon::rpc::protocol::Envelope;
use landfall::model::registration::Registration;
use landfall::registry::store::Registered;
use libfuzzer_sys::fuzz_target;
use serde_json::json;

const GATEWAY: IpAddr = IpAddr::V4(Ipv4Addr::new(172, 17, 0, 1));
const TOKENS: [(&str, Option<&str>); 3] =
    [("a", Some("token-of-a")), ("b", Some("token-of-b")), ("closed", None)];

fuzz_target!(|data: &[u8]| {
    // A head and a body: lines, an empty line, the rest.
    let end = data.windows(2).position(|two| two == b"\n\n");
    let (head, body) = end.map_or((data, &[][..]), |end| (&data[..end], &data[end + 2..]));
    let headers = headers(head);
    check_host(&headers);
    let presented = Presented::in_headers(&headers);
    let naive = headers
        .get(AUTHORIZATION)
        .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "))
        .filter(|token| !token.is_empty());
    assert_eq!(presented.is_some(), naive.is_some());
    let envelope = Envelope::from_bytes(body);
    let name = envelope.as_ref().ok().and_then(Envelope::container_name);
    let (Some(presented), Some(token)) = (presented, naive) else { return };
    let registered = registered();
    let right = TOKENS
        .iter()
        .any(|(known, own)| name == Some(*known) && own.is_some_and(|own| own.as_bytes() == token));
    match Authorized::check(&registered, name, &presented) {
        None => assert!(!right, "the right token was refused"),
        Some(authorized) => {
            assert!(right, "a wrong token was taken");
            assert_eq!(Some(authorized.registration().container_name.as_str()), name);
        }
    }
});

/// Parses the lines as hyper would; hyper rejects invalid ones before they reach the endpoint.
fn headers(head: &[u8]) -> HeaderMap {
    let mut headers = HeaderMap::new();
    for line in head.split(|byte| *byte == b'\n').take(64) {
        let Some(colon) = line.iter().position(|byte| *byte == b':') else { continue };
        let value = line[colon + 1..].trim_ascii();
        if let (Ok(name), Ok(value)) =
            (HeaderName::from_bytes(&line[..colon]), HeaderValue::from_bytes(value))
        {
            headers.append(name, value);
        }
    }
    headers
}

fn check_host(headers: &HeaderMap) {
    if !is_addressed_to_this_host(headers, None, &[GATEWAY]) {
        return;
    }
    for host in headers.get_all(HOST) {
        let text = host.to_str().expect("a name of ours is text").to_ascii_lowercase();
        // The user information before the name in an authority is ignored.
        let text = text.rsplit_once('@').map_or(text.as_str(), |(_, host)| host);
        let bare = match text.strip_prefix('[') {
            Some(rest) => rest.split_once(']').expect("a bracket ends").0,
            None => text.split(':').next().unwrap_or_default(),
        };
        let address = bare.parse::<IpAddr>().map(|address| address.to_canonical());
        let ours = ["localhost", "host.docker.internal"].contains(&bare)
            || address.is_ok_and(|address| address.is_loopback() || address == GATEWAY);
        assert!(ours, "{text:?} is not ours");
    }
}

fn registered() -> Registered {
    let entry = |(name, token): &(&str, Option<&str>)| {
        let fields = json!({"containerName": name, "cwd": "/", "restartToken": token});
        let fields = fields.as_object().expect("an object").clone();
        Arc::new(Registration::from_fields(fields).expect("a registration"))
    };
    Registered { entries: TOKENS.iter().map(entry).collect() }
}
