//! Who asks over HTTP (wire specification, A.2, rows 2 and 7), and whether a browser was talked into asking. Pure.
//!
//! [`Authorized`] can be had only by presenting a container's token, and what acts for a container takes one as an
//! argument: it cannot be reached without the check.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use hyper::header::{AUTHORIZATION, HOST, HeaderMap};
use hyper::http::uri::Authority;

use crate::model::registration::{Registration, Token};
use crate::registry::store::Registered;

/// The scheme, as the wire has it: with this case, and one space.
const SCHEME: &[u8] = b"Bearer ";
/// Names by which the host is called, beside its addresses.
const NAMES: [&str; 2] = ["localhost", "host.docker.internal"];

/// A token that somebody presents. It never prints.
#[derive(Clone)]
pub struct Presented(Vec<u8>);

impl Presented {
    /// The token in the `authorization` header. None where there is no such header, it is of another scheme, or it is
    /// empty.
    pub fn in_headers(headers: &HeaderMap) -> Option<Presented> {
        let token = headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(SCHEME)?;
        (!token.is_empty()).then(|| Presented(token.to_owned()))
    }
}

/// The proof that a container asks for itself.
#[derive(Clone, Debug)]
pub struct Authorized {
    registration: Arc<Registration>,
}

impl Authorized {
    /// Compares a token with that of the container called `name`. A name that is not known, a container without a token
    /// and a wrong token take the same way and the same time: something is compared in each case.
    pub fn check(registered: &Registered, name: Option<&str>, presented: &Presented) -> Option<Authorized> {
        let registration = name.and_then(|name| registered.find(name));
        let token = registration.and_then(|registration| registration.restart_token.as_ref());
        let decoy = Token::new("nobody's");
        // What is not UTF-8 is nobody's token; it is compared as an empty one, which is nobody's either.
        let text = std::str::from_utf8(&presented.0).unwrap_or_default();
        let matches = token.or(decoy.as_ref()).is_some_and(|token| token.matches(text));
        match registration {
            Some(registration) if matches & token.is_some() => {
                Some(Authorized { registration: Arc::clone(registration) })
            }
            _ => None,
        }
    }

    /// The container.
    pub fn registration(&self) -> &Arc<Registration> {
        &self.registration
    }
}

/// Whether everything that a request says about whom it is meant for (`Host`, and the target's own authority, where it
/// has one) names this host. A page in a browser can be made to send requests here under a name of its own that
/// resolves to our address; such a request carries that name. One without a `Host` comes from no browser.
pub fn is_meant_for_us(headers: &HeaderMap, target: Option<&Authority>, own: &[IpAddr]) -> bool {
    let in_headers = headers.get_all(HOST).iter();
    in_headers
        .map(|host| host.to_str().ok().and_then(|host| Authority::from_str(host).ok()))
        .all(|authority| authority.is_some_and(|authority| names_us(authority.host(), own)))
        && target.is_none_or(|authority| names_us(authority.host(), own))
}

fn names_us(host: &str, own: &[IpAddr]) -> bool {
    if NAMES.iter().any(|name| host.eq_ignore_ascii_case(name)) {
        return true;
    }
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let Ok(address) = bare.parse::<IpAddr>() else { return false };
    let address = address.to_canonical();
    address.is_loopback() || own.iter().any(|own| own.to_canonical() == address)
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::header::HeaderValue;
    use serde_json::json;

    fn registered() -> Registered {
        let entry = |value: serde_json::Value| {
            Arc::new(Registration::from_fields(value.as_object().unwrap().clone()).unwrap())
        };
        Registered {
            entries: vec![
                entry(json!({"containerName": "a", "cwd": "/a", "restartToken": "token-of-a"})),
                entry(json!({"containerName": "b", "cwd": "/b", "restartToken": "token-of-b"})),
                entry(json!({"containerName": "closed", "cwd": "/c"})),
            ],
        }
    }

    fn presented(header: &[u8]) -> Option<Presented> {
        let mut headers = HeaderMap::new();
        headers.insert(AUTHORIZATION, HeaderValue::from_bytes(header).unwrap());
        Presented::in_headers(&headers)
    }

    fn who(name: Option<&str>, header: &[u8]) -> Option<String> {
        let authorized = Authorized::check(&registered(), name, &presented(header).unwrap())?;
        Some(authorized.registration().container_name.to_string())
    }

    #[test]
    fn only_bearer_with_one_space_and_a_token_presents_one() {
        assert!(Presented::in_headers(&HeaderMap::new()).is_none());
        for header in ["", "Bearer", "Bearer ", "bearer t", "BEARER t", "Basic t", "Bearert", " Bearer t"] {
            assert!(presented(header.as_bytes()).is_none(), "{header:?}");
        }
        assert_eq!(presented(b"Bearer t").unwrap().0, b"t");
        assert_eq!(presented(b"Bearer  t").unwrap().0, b" t");
    }

    #[test]
    fn a_token_authorizes_its_own_container_alone() {
        assert_eq!(who(Some("a"), b"Bearer token-of-a").as_deref(), Some("a"));
        assert_eq!(who(Some("b"), b"Bearer token-of-b").as_deref(), Some("b"));
        assert_eq!(who(Some("b"), b"Bearer token-of-a"), None);
        assert_eq!(who(Some("a"), b"Bearer  token-of-a"), None);
        assert_eq!(who(Some("a"), b"Bearer token-of-a\xff"), None);
        assert_eq!(who(None, b"Bearer token-of-a"), None);
    }

    #[test]
    fn what_stands_in_for_a_missing_token_authorizes_nobody() {
        for name in [None, Some("unknown"), Some("closed")] {
            assert_eq!(who(name, b"Bearer nobody's"), None, "{name:?}");
            assert_eq!(who(name, b"Bearer \xff"), None, "{name:?}");
        }
    }

    fn meant(hosts: &[&str], target: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_bytes(host.as_bytes()).unwrap());
        }
        let own = ["172.17.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let target = target.map(|target| target.parse().unwrap());
        is_meant_for_us(&headers, target.as_ref(), &own)
    }

    #[test]
    fn our_own_names_and_addresses_are_ours_with_any_port() {
        for host in [
            "127.0.0.1",
            "127.0.0.1:8974",
            "localhost:1",
            "LOCALHOST",
            "host.docker.internal:8974",
            "[::1]",
            "[::1]:8974",
            "172.17.0.1:8974",
            "[fd00::1]:80",
            "[::ffff:172.17.0.1]",
        ] {
            assert!(meant(&[host], None), "{host}");
            assert!(meant(&[], Some(host)), "{host}");
        }
        assert!(meant(&[], None), "no browser leaves the header out");
    }

    #[test]
    fn every_other_name_is_somebody_elses() {
        for host in [
            "evil.example",
            "evil.example:8974",
            "localhost.evil.example",
            "127.0.0.1.evil.example",
            "172.17.0.2",
            "[fd00::2]",
            "",
            "localhost:",
            "a b",
            "user@evil.example",
            "\u{ff}",
        ] {
            // `localhost:` is an authority with an empty port, and still ours.
            assert_eq!(meant(&[host], None), host == "localhost:", "{host:?}");
        }
        assert!(!meant(&["localhost", "evil.example"], None));
        assert!(!meant(&["localhost"], Some("evil.example")));
    }
}
