use std::collections::BTreeMap;

use super::*;

/// Returns an environment with these variables.
fn environment(variables: &[(&str, &str)]) -> Environment {
    let variables: BTreeMap<&str, &str> = variables.iter().copied().collect();
    Environment::from_variables(|name| variables.get(name).map(OsString::from), 1000)
}

fn no_files(_: &Path) -> Result<Option<String>, String> {
    Ok(None)
}

/// Returns the address that `DOCKER_HOST` with this text selects, or the reason.
fn host(text: &str) -> Result<String, String> {
    match locate(&environment(&[("DOCKER_HOST", text)]), no_files) {
        EngineLocation::At(address) => Ok(address.to_string()),
        EngineLocation::Nowhere(unusable) => Err(unusable.reason),
        EngineLocation::Among(_) => panic!("{text} says nothing"),
    }
}

#[test]
fn an_address_is_a_socket_or_a_loopback_port() {
    for (text, expected) in [
        ("unix:///run/x.sock", "unix:///run/x.sock"),
        ("unix:/run/x.sock", "unix:///run/x.sock"),
        ("tcp://127.0.0.1:2376", "tcp://127.0.0.1:2376"),
        ("tcp://localhost", "tcp://localhost:2375"),
        ("tcp://[::1]:99/", "tcp://[::1]:99"),
    ] {
        assert_eq!(host(text).as_deref(), Ok(expected));
    }
    for invalid in [
        "unix://run/x.sock",
        "unix:",
        "tcp://",
        "tcp://127.0.0.1:0",
        "tcp://127.0.0.1:x",
        "tcp://[::1",
        "tcp://[::1]x",
        "npipe:////./pipe/docker_engine",
        "/run/x.sock",
        "http://127.0.0.1:2375",
        "fd://",
    ] {
        assert!(host(invalid).unwrap_err().contains("unix:///PATH"), "{invalid}");
    }
}

#[test]
fn an_engine_on_another_machine_is_refused_with_a_remedy() {
    for elsewhere in
        ["ssh://me@there", "tcp://192.0.2.1:2375", "tcp://there.example:2375", "tcp://[2001:db8::1]:1"]
    {
        assert!(host(elsewhere).unwrap_err().contains("--websocket"), "{elsewhere}");
    }
    let tls = environment(&[("DOCKER_HOST", "tcp://127.0.0.1:2376"), ("DOCKER_TLS_VERIFY", "1")]);
    let EngineLocation::Nowhere(unusable) = locate(&tls, no_files) else { panic!("TLS is not supported") };
    assert!(unusable.reason.contains("TLS") && unusable.at.contains("DOCKER_HOST"), "{unusable:?}");
}

#[test]
fn the_first_setting_is_used() {
    let all = [
        ("DOCKER_HOST", "unix:///a"),
        ("CONTAINER_HOST", "unix:///b"),
        ("DOCKER_CONTEXT", "mine"),
        ("HOME", "/home/u"),
    ];
    let at = |variables: &[(&str, &str)]| locate(&environment(variables), files);
    let address = |path: &str, by: &str| {
        EngineLocation::At(Address { endpoint: Endpoint::Unix(path.into()), source: Some(by.to_owned()) })
    };
    assert_eq!(at(&all), address("/a", "DOCKER_HOST"));
    assert_eq!(at(&all[1..]), address("/b", "CONTAINER_HOST"));
    assert_eq!(at(&all[2..]), address("/mine.sock", "context mine"));
    assert_eq!(at(&all[3..]), address("/mine.sock", "context mine"));
    assert_eq!(at(&[("DOCKER_HOST", ""), all[1]]), address("/b", "CONTAINER_HOST"));
}

/// The files of a user whose context is `mine`. The name of the directory is the one that Docker's command line wrote.
fn files(path: &Path) -> Result<Option<String>, String> {
    let mine = "contexts/meta/3fd30542fe3f61b14bd4a4b2dc0b6fb30fa6f63ebce52dd1778aaa8c4dc02cff/meta.json";
    let text = match path.strip_prefix("/home/u/.docker").ok().and_then(Path::to_str) {
        Some("config.json") => r#"{"auths": {}, "currentContext": "mine"}"#,
        Some(path) if path == mine => {
            r#"{"Name": "mine", "Endpoints": {"docker": {"Host": "unix:///mine.sock"}}}"#
        }
        _ => return Ok(None),
    };
    Ok(Some(text.to_owned()))
}

#[test]
fn an_unusable_context_is_an_error() {
    let reason = |config: &'static str, about: Option<&'static str>| {
        let read = move |path: &Path| {
            let text = if path.ends_with("config.json") { Some(config) } else { about };
            Ok(text.map(str::to_owned))
        };
        match locate(&environment(&[("DOCKER_CONFIG", "/c")]), read) {
            EngineLocation::Nowhere(unusable) => format!("{}: {}", unusable.at, unusable.reason),
            other => panic!("{other:?}"),
        }
    };
    assert!(reason("{", None).starts_with("/c/config.json: invalid JSON"));
    let named = r#"{"currentContext": "x"}"#;
    assert!(reason(named, None).starts_with("context x: the context does not exist"));
    assert!(reason(named, Some("{}")).contains("no address of an engine"));
    let elsewhere = r#"{"Endpoints": {"docker": {"Host": "ssh://there"}}}"#;
    assert!(
        reason(named, Some(elsewhere)).starts_with("ssh://there (context x): containers of another machine")
    );
    let unreadable = locate(&environment(&[("HOME", "/h")]), |_| Err("permission denied".to_owned()));
    assert!(matches!(unreadable, EngineLocation::Nowhere(_)));
}

#[test]
fn without_a_setting_the_first_usable_socket_is_selected() {
    let paths = |variables: &[(&str, &str)]| match locate(&environment(variables), no_files) {
        EngineLocation::Among(paths) => paths,
        other => panic!("{other:?}"),
    };
    let usual = paths(&[("XDG_RUNTIME_DIR", "/x"), ("DOCKER_CONTEXT", "default"), ("HOME", "/home/u")]);
    let expected =
        ["/var/run/docker.sock", "/x/docker.sock", "/x/podman/podman.sock", "/run/podman/podman.sock"];
    assert_eq!(usual, expected.map(PathBuf::from));
    assert_eq!(paths(&[])[1], PathBuf::from("/run/user/1000/docker.sock"));
    let chosen = |looks: [SocketState; 4]| {
        let at = |path: &Path| looks[usual.iter().position(|usual| usual == path).unwrap()];
        select(&usual, at).unwrap().to_string()
    };
    use SocketState::{Absent, Forbidden, Usable};
    assert_eq!(chosen([Usable, Usable, Usable, Usable]), "unix:///var/run/docker.sock");
    assert_eq!(chosen([Forbidden, Absent, Usable, Usable]), "unix:///x/podman/podman.sock");
    assert_eq!(chosen([Absent, Absent, Absent, Forbidden]), "unix:///run/podman/podman.sock");
    assert_eq!(chosen([Absent; 4]), "unix:///var/run/docker.sock");
}
