//! Authorises HTTP requests by token (wire specification, A.2, rows 2 and 7), and rejects cross-site requests of browsers.
//! Pure.
//!
//! An [`Authorized`] is created only by a check of a container's token. Each action on behalf of a container takes one as an
//! argument, so it is never reached without the check.

use std::net::IpAddr;
use std::str::FromStr;
use std::sync::Arc;

use hyper::header::{AUTHORIZATION, HOST, HeaderMap};
use hyper::http::uri::Authority;

use crate::model::registration::{Registration, Token};
use crate::registry::store::Registered;

/// The scheme, exactly as in the wire specification: with this case, and one space.
const SCHEME: &[u8] = b"Bearer ";
/// Names of the host in addition to its addresses.
const NAMES: [&str; 2] = ["localhost", "host.docker.internal"];

/// A token that a client presented. It has no `Debug` output.
#[derive(Clone)]
pub struct Presented(Vec<u8>);

impl Presented {
    /// Returns the token in the `authorization` header; `None` if the header is absent, has another scheme, or is empty.
    pub fn in_headers(headers: &HeaderMap) -> Option<Presented> {
        let token = headers.get(AUTHORIZATION)?.as_bytes().strip_prefix(SCHEME)?;
        (!token.is_empty()).then(|| Presented(token.to_owned()))
    }
}

/// The proof that a container makes the request itself.
#[derive(Clone, Debug)]
pub struct Authorized {
    registration: Arc<Registration>,
}

impl Authorized {
    /// Compares a token with the token of the container `name`. An unknown name, a container without a token and a wrong
    /// token take the same path and the same time: each case compares something.
    pub fn check(registered: &Registered, name: Option<&str>, presented: &Presented) -> Option<Authorized> {
        let registration = name.and_then(|name| registered.find(name));
        let token = registration.and_then(|registration| registration.restart_token.as_ref());
        let decoy = Token::new("nobody's");
        // A token that is not UTF-8 is compared as an empty one, which no container has.
        let text = std::str::from_utf8(&presented.0).unwrap_or_default();
        let matches = token.or(decoy.as_ref()).is_some_and(|token| token.matches(text));
        match registration {
            Some(registration) if matches & token.is_some() => {
                Some(Authorized { registration: Arc::clone(registration) })
            }
            _ => None,
        }
    }

    /// Returns the container's registration.
    pub fn registration(&self) -> &Arc<Registration> {
        &self.registration
    }
}

/// Returns whether the request is addressed to this host, by `Host` and by the authority of its target, if present. A web
/// page can make a browser send requests here under a name of its own that resolves to this host's address (DNS rebinding).
/// Such a request carries that name. A request without `Host` is not from a browser.
pub fn is_addressed_to_this_host(headers: &HeaderMap, target: Option<&Authority>, own: &[IpAddr]) -> bool {
    let in_headers = headers.get_all(HOST).iter();
    in_headers
        .map(|host| host.to_str().ok().and_then(|host| Authority::from_str(host).ok()))
        .all(|authority| authority.is_some_and(|authority| names_this_host(authority.host(), own)))
        && target.is_none_or(|authority| names_this_host(authority.host(), own))
}

fn names_this_host(host: &str, own: &[IpAddr]) -> bool {
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

    fn authorized_name(name: Option<&str>, header: &[u8]) -> Option<String> {
        let authorized = Authorized::check(&registered(), name, &presented(header).unwrap())?;
        Some(authorized.registration().container_name.to_string())
    }

    #[test]
    fn only_the_exact_scheme_with_a_token_is_accepted() {
        assert!(Presented::in_headers(&HeaderMap::new()).is_none());
        for header in ["", "Bearer", "Bearer ", "bearer t", "BEARER t", "Basic t", "Bearert", " Bearer t"] {
            assert!(presented(header.as_bytes()).is_none(), "{header:?}");
        }
        assert_eq!(presented(b"Bearer t").unwrap().0, b"t");
        assert_eq!(presented(b"Bearer  t").unwrap().0, b" t");
    }

    #[test]
    fn a_token_authorizes_only_its_own_container() {
        assert_eq!(authorized_name(Some("a"), b"Bearer token-of-a").as_deref(), Some("a"));
        assert_eq!(authorized_name(Some("b"), b"Bearer token-of-b").as_deref(), Some("b"));
        assert_eq!(authorized_name(Some("b"), b"Bearer token-of-a"), None);
        assert_eq!(authorized_name(Some("a"), b"Bearer  token-of-a"), None);
        assert_eq!(authorized_name(Some("a"), b"Bearer token-of-a\xff"), None);
        assert_eq!(authorized_name(None, b"Bearer token-of-a"), None);
    }

    #[test]
    fn the_decoy_token_authorizes_no_container() {
        for name in [None, Some("unknown"), Some("closed")] {
            assert_eq!(authorized_name(name, b"Bearer nobody's"), None, "{name:?}");
            assert_eq!(authorized_name(name, b"Bearer \xff"), None, "{name:?}");
        }
    }

    fn is_addressed(hosts: &[&str], target: Option<&str>) -> bool {
        let mut headers = HeaderMap::new();
        for host in hosts {
            headers.append(HOST, HeaderValue::from_bytes(host.as_bytes()).unwrap());
        }
        let own = ["172.17.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let target = target.map(|target| target.parse().unwrap());
        is_addressed_to_this_host(&headers, target.as_ref(), &own)
    }

    #[test]
    fn names_and_addresses_of_this_host_match_with_any_port() {
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
            assert!(is_addressed(&[host], None), "{host}");
            assert!(is_addressed(&[], Some(host)), "{host}");
        }
        assert!(is_addressed(&[], None), "browsers always send the header");
    }

    #[test]
    fn all_other_names_are_rejected() {
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
            // `localhost:` is an authority with an empty port, and names this host.
            assert_eq!(is_addressed(&[host], None), host == "localhost:", "{host:?}");
        }
        assert!(!is_addressed(&["localhost", "evil.example"], None));
        assert!(!is_addressed(&["localhost"], Some("evil.example")));
    }
}
