use super::*;

#[test]
fn the_list_is_read_as_it_was_written() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tailscale.json");
    assert_eq!(read(&file).unwrap(), Ports::new());
    let ports = Ports::from([(NonZeroU16::new(3000).unwrap(), "coder".to_owned())]);
    write(&file, ports.clone()).unwrap();
    assert_eq!(read(&file).unwrap(), ports);
    assert_eq!(std::fs::read_to_string(&file).unwrap(), r#"{"formatVersion":1,"ports":{"3000":"coder"}}"#);
    write(&file, Ports::new()).unwrap();
    assert!(!file.exists());
    write(&file, Ports::new()).unwrap();
}

#[test]
fn an_invalid_list_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("tailscale.json");
    for text in ["", "[]", r#"{"formatVersion":2,"ports":{}}"#, r#"{"formatVersion":1,"ports":{"0":"a"}}"#] {
        std::fs::write(&file, text).unwrap();
        assert!(read(&file).is_err(), "{text}");
    }
}
